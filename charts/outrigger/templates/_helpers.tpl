{{- /* Fixed names: whoever asks for a certificate is known by its namespace, and the injector writes the Service's name
       into pods. A second mesh in a cluster would fight for the same pods. */ -}}
{{- define "outrigger.check" -}}
{{- if ne .Release.Namespace "outrigger-system" }}
{{- fail (printf "Outrigger lives in the namespace outrigger-system, not in %s: one mesh a cluster, whose identities name that namespace. Install it with: helm install outrigger <chart> --namespace outrigger-system --create-namespace" .Release.Namespace) }}
{{- end }}
{{- if and .Values.ca.certManager.enabled (not .Values.ca.certManager.issuerRef.name) }}
{{- fail "ca.certManager.issuerRef.name: name the Issuer or ClusterIssuer that signs the mesh's CA" }}
{{- end }}
{{- end }}

{{- /* The labels by which a component's pods are known. They never change. */ -}}
{{- define "outrigger.selector" -}}
app.kubernetes.io/name: outrigger
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- /* The labels of pods: takes (dict "root" $ "component" "controller"). */ -}}
{{- define "outrigger.podLabels" -}}
{{ include "outrigger.selector" .component }}
app.kubernetes.io/part-of: outrigger
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Those of an object; they name the chart's version, at which a pod must not start anew. */ -}}
{{- define "outrigger.labels" -}}
{{ include "outrigger.podLabels" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- /* The metadata of an object: takes (dict "root" $ "component" "controller" "name" "x"), with "labels" and "annotations"
       where it has some of its own, and "cluster" true where it has no namespace. */ -}}
{{- define "outrigger.metadata" -}}
name: {{ .name }}
{{- if not .cluster }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "outrigger.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* An image's name: takes (dict "root" $ "name" "controller"). */ -}}
{{- define "outrigger.image" -}}
{{- $image := .root.Values.image -}}
{{- $name := eq .name "cli" | ternary "outrigger" (printf "outrigger-%s" .name) -}}
{{- $tag := $image.tag | default .root.Chart.AppVersion -}}
{{- $digest := get $image.digests .name -}}
{{ $image.registry }}/{{ $name }}{{ empty $digest | ternary (printf ":%s" $tag) (printf "@%s" $digest) }}
{{- end }}

{{- /* The metadata of a component's pods: takes the same as "outrigger.podLabels", and "values". */ -}}
{{- define "outrigger.podMetadata" -}}
labels:
  {{- include "outrigger.podLabels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  kubectl.kubernetes.io/default-container: {{ .component }}
  {{- if ne .component "cni" }}
  # The configuration is read once, at the start: other words in it are other pods.
  checksum/config: {{ include "outrigger.config" .root | sha256sum }}
  {{- end }}
  {{- with merge (dict) .values.podAnnotations .root.Values.commonAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- /* What all pods have in common: where they run and what they are spared. Takes the same. */ -}}
{{- define "outrigger.pod" -}}
# Its variables would be named as our own: OUTRIGGER_CONTROLLER_PORT of a Service and of a configuration.
enableServiceLinks: false
# The token is mounted below, where the container needs it.
automountServiceAccountToken: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .values.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Pod Security `restricted`. */ -}}
{{- define "outrigger.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "outrigger.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* What a client in a pod looks for, as the API server would have mounted it. */ -}}
{{- define "outrigger.apiToken" -}}
- name: api-token
  projected:
    defaultMode: 0440
    sources:
    - serviceAccountToken:
        path: token
        expirationSeconds: 3607
    - configMap:
        name: kube-root-ca.crt
        items:
        - key: ca.crt
          path: ca.crt
    - downwardAPI:
        items:
        - path: namespace
          fieldRef:
            fieldPath: metadata.namespace
{{- end }}

{{- define "outrigger.apiTokenMount" -}}
- name: api-token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end }}

{{- /* A PodDisruptionBudget: takes the same as "outrigger.podMetadata". */ -}}
{{- define "outrigger.podDisruptionBudget" -}}
{{- with .values.podDisruptionBudget }}
{{- if .enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "outrigger.metadata" (dict "root" $.root "component" $.component "name" (printf "outrigger-%s" $.component)) | nindent 2 }}
spec:
  maxUnavailable: {{ .maxUnavailable }}
  selector:
    matchLabels:
      {{- include "outrigger.selector" $.component | nindent 6 }}
  # A pod that is not ready serves nobody: it must not hold up a node.
  unhealthyPodEvictionPolicy: AlwaysAllow
{{- end }}
{{- end }}
{{- end }}

{{- /* The configuration of the controller and of the injector: one file for both roles. */ -}}
{{- define "outrigger.config" -}}
{{- $any := .Values.ipv6 | ternary "[::]" "0.0.0.0" -}}
{{- $consul := dict
  "addresses" .Values.consul.addresses
  "datacenters" .Values.consul.datacenters
  "default_namespace" .Values.consul.defaultNamespace
  "domain" .Values.consul.domain -}}
{{- if .Values.consul.tokenSecret.name }}{{ $_ := set $consul "token_file" "/var/run/secrets/outrigger/consul-token/token" }}{{ end -}}
{{- if .Values.consul.caSecret.name }}{{ $_ := set $consul "ca_file" "/var/run/secrets/outrigger/consul-ca/ca.crt" }}{{ end -}}
{{- /* An amount may be written as a number, as everywhere in Kubernetes; the injector takes its text. */ -}}
{{- $resources := dict -}}
{{- range $kind, $amounts := .Values.proxy.resources -}}
{{- $texts := dict -}}
{{- range $of, $amount := $amounts }}{{ $_ := set $texts $of (toString $amount) }}{{ end -}}
{{- $_ := set $resources $kind $texts -}}
{{- end -}}
{{- $config := dict
  "trust_domain" .Values.trustDomain
  "mesh_namespace" .Release.Namespace
  "data_dir" "/var/lib/outrigger"
  "listen" (printf "%s:15410" $any)
  "metrics_listen" (printf "%s:15490" $any)
  "log" .Values.log
  "mesh_cidrs" .Values.mesh.cidrs
  "outbound" .Values.mesh.outbound
  "inbound" .Values.mesh.inbound
  "mtls" .Values.mesh.mtls
  "leaf_life" .Values.mesh.leafLife
  "kubernetes" (dict
    "enabled" true
    "cluster_domain" .Values.clusterDomain
    "external_ca" (or .Values.ca.external .Values.ca.certManager.enabled))
  "policies" (dict "store" "kubernetes")
  "injector" (dict
    "listen" (printf "%s:15443" $any)
    "mode" (.Values.cni.enabled | ternary "cni" "init")
    "image" (include "outrigger.image" (dict "root" . "name" "proxy"))
    "image_pull_policy" .Values.image.pullPolicy
    "resources" $resources
    "log_level" .Values.proxy.log.level
    "log_format" .Values.proxy.log.format
    "skip_inbound_ports" .Values.proxy.skipInboundPorts
    "skip_outbound_ports" .Values.proxy.skipOutboundPorts
    "skip_outbound_cidrs" .Values.proxy.skipOutboundCidrs
    "opaque_ports" .Values.proxy.opaquePorts) -}}
{{- with .Values.proxy.concurrency }}{{ $_ := set $config.injector "concurrency" (int .) }}{{ end -}}
{{- if .Values.consul.addresses }}{{ $_ := set $config "consul" $consul }}{{ end -}}
{{- toYaml (mergeOverwrite $config (deepCopy .Values.controller.config)) }}
{{- end }}
