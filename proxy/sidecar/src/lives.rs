//! What all threads know together of the services that are in use, by name.
//!
//! A worker asks once for each service that it begins to use; requests touch what they got. What no thread uses any more leaves when
//! the next one is asked for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use outrigger_core::live::Live;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// See the module. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Lives(Arc<Mutex<HashMap<Arc<str>, Arc<Live>>>>);

impl Lives {
    /// What is known of a service.
    pub(crate) fn of(&self, service: &Arc<str>) -> Arc<Live> {
        let mut lives = self.lock();
        if let Some(live) = lives.get(service) {
            return live.clone();
        }
        lives.retain(|_, live| Arc::strong_count(live) > 1);
        lives.entry(service.clone()).or_insert_with(|| Arc::new(Live::new(Instant::now()))).clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Live>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Read when scraped: breakers work without counting for it.
impl Collector for Lives {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let mut lives: Vec<(Arc<str>, Arc<Live>)> =
            self.lock().iter().map(|(service, live)| (service.clone(), live.clone())).collect();
        lives.sort_by(|a, b| a.0.cmp(&b.0));
        let kind = ConstCounter::new(0_u64).metric_type();
        let mut ejections = encoder.encode_descriptor(
            "ejections",
            "Endpoints that breakers put aside, by cause",
            None,
            kind,
        )?;
        for (service, live) in &lives {
            for (cause, count) in live.ejections().filter(|(_, count)| *count > 0) {
                let labels = [("service", &**service), ("cause", cause.as_str())];
                ConstCounter::new(count).encode(ejections.encode_family(&labels)?)?;
            }
        }
        let kind = ConstGauge::new(0_i64).metric_type();
        let mut ejected =
            encoder.encode_descriptor("ejected_endpoints", "Endpoints that are put aside now", None, kind)?;
        for (service, live) in &lives {
            let count = i64::try_from(live.ejected()).unwrap_or(i64::MAX);
            ConstGauge::new(count).encode(ejected.encode_family(&[("service", &**service)])?)?;
        }
        let mut panic = encoder.encode_descriptor(
            "ejection_cap_reached",
            "Whether endpoints that fail go on being asked, because no more may be put aside",
            None,
            kind,
        )?;
        for (service, live) in &lives {
            let value = i64::from(live.panicking());
            ConstGauge::new(value).encode(panic.encode_family(&[("service", &**service)])?)?;
        }
        Ok(())
    }
}
