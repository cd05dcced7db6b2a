//! A watched directory of service files.
