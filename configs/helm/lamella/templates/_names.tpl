{{/* The release's name as every object of it starts, short enough for what is added to it. */}}
{{- define "lamella.name" -}}
{{- if contains "lamella" .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-lamella" .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods of a part: (dict "root" . "part" "gateway"). */}}
{{- define "lamella.selector" -}}
app.kubernetes.io/name: lamella
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "lamella.labels" -}}
{{ include "lamella.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "lamella.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "lamella.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lamella.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where the server is and who logs in: (dict "root" . "user" "worker"). */}}
{{- define "lamella.redisEnvironment" -}}
{{- if .root.Values.valkey.enabled -}}
- name: LAMELLA_REDIS_URL
  value: redis://lamella-{{ .user }}@{{ include "lamella.name" .root }}-valkey:6379/0
{{- else -}}
- name: LAMELLA_REDIS_URL_FILE
  value: /etc/lamella/redis/{{ .user }}.url
{{- end }}
- name: LAMELLA_REDIS_PASSWORD_FILE
  value: /etc/lamella/users/{{ .user }}.password
{{- end -}}

{{- define "lamella.redisMounts" -}}
- {name: users, mountPath: /etc/lamella/users, readOnly: true}
{{- if not .root.Values.valkey.enabled }}
- {name: redis, mountPath: /etc/lamella/redis, readOnly: true}
{{- end }}
{{- if .root.Values.redis.caSecret }}
- {name: ca, mountPath: /etc/lamella/ca, readOnly: true}
{{- end }}
{{- end -}}

{{/* Each pod sees its own password only. */}}
{{- define "lamella.redisVolumes" -}}
- name: users
  secret:
    secretName: {{ .root.Values.usersSecret }}
    defaultMode: 0440
    items: [{key: {{ .user }}.password, path: {{ .user }}.password}]
{{- if not .root.Values.valkey.enabled }}
- name: redis
  secret:
    secretName: {{ required "valkey.enabled is false, so set redis.urlSecret: a Secret with worker.url, gateway.url and client.url" .root.Values.redis.urlSecret }}
    defaultMode: 0440
    items: [{key: {{ .user }}.url, path: {{ .user }}.url}]
{{- end }}
{{- if .root.Values.redis.caSecret }}
- name: ca
  secret:
    secretName: {{ .root.Values.redis.caSecret }}
    defaultMode: 0444
    items: [{key: ca.pem, path: ca.pem}]
{{- end }}
{{- end -}}

{{/* A value as TOML. */}}
{{- define "lamella.toml" -}}
{{- if kindIs "slice" . -}}
[{{ range $at, $each := . }}{{ if $at }}, {{ end }}{{ include "lamella.toml" $each }}{{ end }}]
{{- else if kindIs "string" . -}}
{{ . | toJson }}
{{- else if kindIs "map" . -}}
{ {{ $first := true }}{{ range $key, $each := . }}{{ if not $first }}, {{ end }}{{ $first = false }}{{ $key | toJson }} = {{ include "lamella.toml" $each }}{{ end }} }
{{- else if kindIs "bool" . -}}
{{ . }}
{{- else -}}
{{- /* Whole numbers without exponent or point, which settings of whole numbers refuse. */ -}}
{{ if eq (float64 .) (floor .) }}{{ printf "%.0f" (float64 .) }}{{ else }}{{ float64 . }}{{ end }}
{{- end -}}
{{- end -}}
