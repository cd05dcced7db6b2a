{{- define "demo.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: outrigger-demo
{{- end }}

{{- /* What the pods of the services and of the client have in common: takes (dict "root" $ "name" "web" "args" list). */ -}}
{{- define "demo.pod" -}}
serviceAccountName: {{ .name }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ add .root.Values.lingerSeconds 30 }}
securityContext:
  runAsNonRoot: true
  seccompProfile:
    type: RuntimeDefault
containers:
- name: {{ .name }}
  image: {{ .root.Values.image.registry }}/outrigger:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args:
    {{- toYaml .args | nindent 4 }}
  env:
  - name: POD_NAME
    valueFrom:
      fieldRef:
        fieldPath: metadata.name
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: [ALL]
{{- end }}
