{{- define "llmkit.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "llmkit.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "llmkit.labels" -}}
{{ include "llmkit.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "llmkit.keys" -}}
{{ .Values.apiKey.existingSecret | default (printf "%s-keys" (include "llmkit.name" .)) }}
{{- end }}

{{/* The path before all routes: a hub's service has the one at which its proxy passes it on. */}}
{{- define "llmkit.base" -}}
{{- if .Values.hub.enabled }}
{{- if .Values.gateway.basePath }}
{{- fail "gateway.basePath is hub.baseUrl and hub.serviceName where hub.enabled is true: leave it out" }}
{{- end }}
{{- printf "%sservices/%s" .Values.hub.baseUrl .Values.hub.serviceName }}
{{- else }}{{ .Values.gateway.basePath }}{{ end }}
{{- end }}

{{- define "llmkit.hubKey" -}}
{{ .Values.hub.secretKey | default (printf "hub.services.%s.apiToken" .Values.hub.serviceName) }}
{{- end }}

{{- define "llmkit.fleetSecret" -}}
{{ .Values.fleetKey.existingSecret | default (printf "%s-fleet" (include "llmkit.name" .)) }}
{{- end }}

{{/* What all pods of the chart are not allowed. */}}
{{- define "llmkit.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "llmkit.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
