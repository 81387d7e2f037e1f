{{/* What the schema can't say: values that don't go together, each refused by its key. */}}
{{- define "raytrain.checks" -}}
{{- $values := .Values -}}
{{- range $key, $value := $values -}}
{{- /* Helm's YAML loses these, or what holds them. JSON has two of them as \u2028 and \u2029. */ -}}
{{- if regexMatch `[\x7f-\x9f\x{feff}\x{fffe}\x{ffff}]|(^|[^\\])(\\\\)*\\u202[89]` (toJson $value) -}}
{{- fail (printf "%s: it holds a control character (U+007F to U+009F, U+2028, U+2029 or U+FEFF)" $key) -}}
{{- end -}}
{{- end -}}
{{- if and $values.framework (not (.Files.Glob (printf "scripts/%s/**" $values.framework))) -}}
{{- fail (printf "framework: there is no folder scripts/%s in the chart; '' mounts no scripts" $values.framework) -}}
{{- end -}}
{{- if $values.package.fromConfigMap -}}
{{- if not (.Files.Get "files/tunesmith.zip") -}}
{{- fail "package.fromConfigMap: the chart holds no files/tunesmith.zip; in the repository `python -m tunesmith.chart.package charts/raytrain/files/tunesmith.zip` writes it" -}}
{{- end -}}
{{- range $values.train.env -}}
{{- if and (eq .name "PYTHONPATH") .valueFrom -}}
{{- fail "package.fromConfigMap: it comes first in PYTHONPATH, which train.env must then give as a value, not by valueFrom" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with $values.elastic -}}
{{- /* Of a file Helm reads floats, of --set integers. */ -}}
{{- $nnodes := int64 $values.resources.nnodes -}}
{{- $least := int64 .min_nodes -}}
{{- $most := int64 .max_nodes -}}
{{- if gt $least $most -}}
{{- fail (printf "elastic.min_nodes is %v, above elastic.max_nodes (%v)" $least $most) -}}
{{- end -}}
{{- if or (lt $nnodes $least) (gt $nnodes $most) -}}
{{- fail (printf "resources.nnodes is %v, outside elastic.min_nodes (%v) to elastic.max_nodes (%v)" $nnodes $least $most) -}}
{{- end -}}
{{- if $values.job.queue -}}
{{- fail "elastic and job.queue exclude each other: Kueue admits a job of one size" -}}
{{- end -}}
{{- end -}}
{{- if and $values.serve.enabled (not $values.serve.models) -}}
{{- fail "serve.models: name the runs, adapters or models to serve, by their paths on the claims of pvc" -}}
{{- end -}}
{{- range $component := $values.serve.enabled | ternary (list "head" "worker" "serve") (list "head" "worker") -}}
{{- $resources := include "raytrain.resources" (dict "root" $ "component" $component) | fromYaml -}}
{{- $key := get (dict "head" "ray.resources" "serve" "serve.resources") $component | default "resources" -}}
{{- $requests := $resources.requests | default dict -}}
{{- $limits := $resources.limits | default dict -}}
{{- range $name, $_ := merge (dict) $requests $limits -}}
{{- if and (eq $component "head") (regexMatch "gpu$|^nvidia\\.com/mig-" $name) -}}
{{- fail (printf "ray.resources: %s: the head gets no GPU; resources are those of the workers" $name) -}}
{{- end -}}
{{- if and (regexMatch "/|^hugepages-" $name) (ne (get $requests $name) (get $limits $name)) -}}
{{- fail (printf "%s: %s needs equal requests and limits, and has %s and %s" $key $name (get $requests $name | default "none") (get $limits $name | default "none")) -}}
{{- end -}}
{{- if and (hasPrefix "hugepages-" $name) (not (or $requests.cpu $requests.memory $limits.cpu $limits.memory)) -}}
{{- fail (printf "%s: %s needs cpu or memory beside it" $key $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $paths := list -}}
{{- range include "raytrain.disks" . | fromYamlArray -}}
{{- if has .mount.mountPath $paths -}}
{{- fail (printf "mount_path: two volumes are mounted at %s (pvc, ebs, scratch, shared_memory)" .mount.mountPath) -}}
{{- end -}}
{{- $paths = append $paths .mount.mountPath -}}
{{- end -}}
{{- end -}}
