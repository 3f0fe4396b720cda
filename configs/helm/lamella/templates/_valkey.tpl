{{/* The server's settings, those of configs/valkey.conf with users and a place for the data. */}}
{{- define "lamella.valkeySettings" -}}
dir /data
aclfile /etc/lamella/users/users.acl
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
maxmemory {{ .Values.valkey.maxmemory }}
tcp-keepalive 60
timeout 0
client-output-buffer-limit pubsub 32mb 8mb 60
{{- end -}}
