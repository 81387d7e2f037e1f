{{/* The files that the pods find at /etc/tunesmith and /etc/framework-scripts, as data of ConfigMaps. */}}

{{- define "raytrain.jobFiles" -}}
{{- $files := dict
      "job.sh" (.Files.Get "files/job.sh")
      "export_env.py" (.Files.Get "files/export_env.py")
      "run.yaml" (printf "%s\n" (toYaml .Values.run))
      "train.sh" (include "raytrain.train" .) -}}
{{- range $name := list "inline_script" "pre_script" "post_script" -}}
{{- with get $.Values $name -}}
{{- $_ := set $files (printf "%s.sh" $name) (include "raytrain.shell" (dict "key" $name "value" . "separator" "\n")) -}}
{{- end -}}
{{- end -}}
{{- if .Values.git.repo_url -}}
{{- $_ := set $files "git.sh" (include "raytrain.git" .) -}}
{{- end -}}
{{- if .Values.spot -}}
{{- $_ := set $files "drain.sh" (.Files.Get "files/drain.sh") -}}
{{- end -}}
{{- toYaml $files -}}
{{- end -}}

{{/* What to clone, as assignments of a shell. */}}
{{- define "raytrain.git" -}}
{{- range $key := list "repo_url" "branch" "commit" -}}
raytrain_{{ $key }}='{{ get $.Values.git $key | default "" | replace "'" "'\\''" }}'
{{ end -}}
{{- end -}}

{{- define "raytrain.scripts" -}}
{{- $files := dict -}}
{{- range $path, $content := .Files.Glob (printf "scripts/%s/**" .Values.framework) -}}
{{- $_ := set $files (include "raytrain.scriptKey" (dict "root" $ "path" $path)) (toString $content) -}}
{{- end -}}
{{- toYaml $files -}}
{{- end -}}

{{- define "raytrain.scriptItems" -}}
{{- $folder := printf "scripts/%s/" .Values.framework -}}
{{- range $path, $_ := .Files.Glob (printf "%s**" $folder) }}
- key: {{ include "raytrain.scriptKey" (dict "root" $ "path" $path) }}
  path: {{ trimPrefix $folder $path | quote }}
{{- end }}
{{- end -}}

{{/* Key of a script: its path below the framework's folder, in the characters that a key may have. */}}
{{- define "raytrain.scriptKey" -}}
{{- $path := trimPrefix (printf "scripts/%s/" .root.Values.framework) .path | replace "/" "__" -}}
{{- regexReplaceAll "[^-._a-zA-Z0-9]" $path "_" -}}
{{- end -}}
