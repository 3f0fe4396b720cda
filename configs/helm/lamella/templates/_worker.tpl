{{/* A pool's settings file, which `lamella worker` checks as it checks every other. */}}
{{- define "lamella.settings" -}}
[redis]
prefix = {{ .root.Values.prefix | toJson }}

[worker]
models = {{ include "lamella.toml" .pool.models }}
device = {{ if .pool.gpus }}"cuda:0"{{ else }}"cpu"{{ end }}
{{- range $key, $value := .pool.worker | default dict }}
{{ $key }} = {{ include "lamella.toml" $value }}
{{- end }}

[engine]
store = "/var/lib/lamella/shards"
shared_memory = "/var/lib/lamella/ram/shared"
{{- range $key, $value := .pool.engine | default dict }}
{{ $key }} = {{ include "lamella.toml" $value }}
{{- end }}
{{- if .root.Values.metrics.enabled }}

[telemetry]
metrics_port = {{ .root.Values.metrics.workerPort }}
metrics_host = "0.0.0.0"
{{- end }}
{{- end -}}

{{/* What a pod asks for, with its card. */}}
{{- define "lamella.poolResources" -}}
{{- $resources := deepCopy (.resources | default dict) -}}
{{- if .gpus -}}
{{- $limits := get $resources "limits" | default dict -}}
{{- $_ := set $limits (.gpuResource | default "nvidia.com/gpu") .gpus -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
