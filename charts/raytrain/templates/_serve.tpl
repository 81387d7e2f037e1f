{{/* The server's container: what differs from that of a training. */}}
{{- define "raytrain.server" -}}
{{- $serve := .Values.serve -}}
{{- $words := list -}}
{{- range $serve.models -}}
{{- $words = append $words . -}}
{{- end -}}
{{- $words = concat $words (list "--host=0.0.0.0" (printf "--port=%d" (int64 $serve.port))) -}}
{{- range $serve.args -}}
{{- $words = append $words (include "raytrain.text" (dict "key" "serve.args" "value" .)) -}}
{{- end -}}
{{- if $serve.vllm_args -}}
{{- $words = append $words "--" -}}
{{- range $serve.vllm_args -}}
{{- $words = append $words (include "raytrain.text" (dict "key" "serve.vllm_args" "value" .)) -}}
{{- end -}}
{{- end -}}
command: [python, -m, tunesmith, serve]
args: {{- toYaml $words | nindent 2 }}
env: {{- include "raytrain.serveEnv" . | nindent 2 }}
ports:
  - name: http
    containerPort: {{ int64 $serve.port }}
# What has to be merged is merged, and the weights are read, before it answers.
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  failureThreshold: {{ max 1 (ceil (divf (int64 $serve.startup_seconds) 10)) | int64 }}
readinessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 30
  timeoutSeconds: 10
{{- end -}}

{{/* Environment of the server. */}}
{{- define "raytrain.serveEnv" -}}
{{- $given := include "raytrain.variables" (dict "root" . "key" "serve.env" "given" .Values.serve.env) | fromYamlArray -}}
{{- $names := list -}}
{{- $paths := list -}}
{{- $list := list -}}
{{- range $given -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if not (has "HOME" $names) -}}
{{- /* For the caches of compiled kernels, which several pods on one disk would spoil. */ -}}
{{- $list = append $list (dict "name" "HOME" "value" "/tmp") -}}
{{- end -}}
{{- with .Values.serve.api_key -}}
{{- $source := dict "secretKeyRef" (dict "name" .name "key" .key) -}}
{{- $list = append $list (dict "name" "VLLM_API_KEY" "valueFrom" $source) -}}
{{- end -}}
{{- range $given -}}
{{- if and (eq .name "PYTHONPATH") $.Values.package.fromConfigMap -}}
{{- $paths = append $paths .value -}}
{{- else if not (and (eq .name "VLLM_API_KEY") $.Values.serve.api_key) -}}
{{- $list = append $list . -}}
{{- end -}}
{{- end -}}
{{- if .Values.package.fromConfigMap -}}
{{- $value := prepend $paths "/etc/tunesmith-package/tunesmith.zip" | compact | join ":" -}}
{{- $list = append $list (dict "name" "PYTHONPATH" "value" $value) -}}
{{- end -}}
{{- toYaml $list -}}
{{- end -}}
