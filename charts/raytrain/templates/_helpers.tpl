{{/*
Names, labels and single values. A value that a person may write as a number goes through raytrain.text:
Helm holds every number as a float. toYaml takes off a last newline, which a text may need to be read back.
*/}}

{{/* A group that was set to null, as by a key with nothing below it, is an empty one. */}}
{{- define "raytrain.fill" -}}
{{- range list "git" "package" "train" "run" "job" "head" "worker" "submitter" "serve" -}}
{{- if not (get $.Values .) -}}
{{- $_ := set $.Values . dict -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Name of the RayJob. KubeRay takes 47 characters of a-z, 0-9 and -; a name that was changed gets a digest. */}}
{{- define "raytrain.name" -}}
{{- $wanted := printf "rayjob-%s" .Release.Name -}}
{{- $name := $wanted | lower | replace "." "-" -}}
{{- if or (ne $name $wanted) (gt (len $name) 47) -}}
{{- $name = printf "%s-%s" ($name | trunc 38 | trimSuffix "-") (sha256sum $wanted | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Name of the Deployment and its Service, which takes 63 characters of a-z, 0-9 and -. */}}
{{- define "raytrain.serveName" -}}
{{- $wanted := printf "serve-%s" .Release.Name -}}
{{- $name := $wanted | lower | replace "." "-" -}}
{{- if ne $name $wanted -}}
{{- $name = printf "%s-%s" ($name | trunc 54 | trimSuffix "-") (sha256sum $wanted | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Whether there is a training: always, unless the release serves alone. */}}
{{- define "raytrain.trains" -}}
{{- if or (not .Values.serve.enabled) .Values.serve.train_too -}}yes{{- end -}}
{{- end -}}

{{- define "raytrain.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "raytrain.image" -}}
{{- .Values.image | default (printf "tunesmith:%s" .Chart.AppVersion) -}}
{{- end -}}

{{/* Text of a scalar `value`; `key` names it in errors. */}}
{{- define "raytrain.text" -}}
{{- if kindIs "string" .value -}}
{{- .value -}}
{{- else if not (kindIs "invalid" .value) -}}
{{- if kindIs "float64" .value -}}
{{- if or (gt .value 9007199254740991.0) (lt .value -9007199254740991.0) -}}
{{- fail (printf "%s: %v is too large for Helm to keep exactly; put it in quotes" .key .value) -}}
{{- end -}}
{{- end -}}
{{- toJson .value -}}
{{- end -}}
{{- end -}}

{{/* Shell text: a string, or the items of a list joined by `separator`. */}}
{{- define "raytrain.shell" -}}
{{- $texts := list -}}
{{- range $item := kindIs "slice" .value | ternary .value (list .value) -}}
{{- $texts = append $texts (include "raytrain.text" (dict "key" $.key "value" $item)) -}}
{{- end -}}
{{- join .separator $texts -}}
{{- end -}}

{{/* A map of scalars with each value as a string: resource quantities. */}}
{{- define "raytrain.texts" -}}
{{- $texts := dict -}}
{{- range $name, $value := .value -}}
{{- $_ := set $texts $name (include "raytrain.text" (dict "key" (printf "%s.%s" $.key $name) "value" $value)) -}}
{{- end -}}
{{- toYaml $texts -}}
{{- end -}}

{{/* Ray's version. A number that ends in one digit, as 2.6, could have been written 2.60. */}}
{{- define "raytrain.rayVersion" -}}
{{- $version := include "raytrain.text" (dict "key" "ray.version" "value" .Values.ray.version) -}}
{{- if not (or (kindIs "string" .Values.ray.version) (regexMatch "^[0-9]+\\.[0-9]+[1-9]$" $version)) -}}
{{- fail (printf "ray.version: it is the number %s, which may have lost a zero; put it in quotes, as '2.60.0'" $version) -}}
{{- end -}}
{{- $version -}}
{{- end -}}

{{/* The runtime environment as YAML text: given as text, as a mapping, or under the key of KubeRay's field. */}}
{{- define "raytrain.runtimeEnv" -}}
{{- $given := .Values.ray.runtime_env_yaml -}}
{{- if and (kindIs "map" $given) (hasKey $given "runtimeEnvYAML") -}}
{{- $given = $given.runtimeEnvYAML -}}
{{- end -}}
{{- $text := kindIs "string" $given | ternary $given (empty $given | ternary "" (printf "%s\n" (toYaml $given))) -}}
{{- $read := fromYaml $text -}}
{{- if hasKey $read "Error" -}}
{{- fail (printf "ray.runtime_env_yaml: it isn't a mapping in YAML: %s" $read.Error) -}}
{{- end -}}
{{- $text -}}
{{- end -}}

{{/* The shell text of the training. */}}
{{- define "raytrain.train" -}}
{{- $command := include "raytrain.shell" (dict "key" "train.command" "value" .Values.train.command "separator" " ") -}}
{{- $args := include "raytrain.shell" (dict "key" "train.args" "value" .Values.train.args "separator" " ") -}}
{{- $scripts := or .Values.inline_script .Values.pre_script .Values.post_script -}}
{{- if and (not $command) (or .Values.run $args (not $scripts)) -}}
{{- $command = "python -m tunesmith train /etc/tunesmith/run.yaml" -}}
{{- if not .Values.run.home -}}
{{- $command = printf "%s --home=\"$HOME\"" $command -}}
{{- end -}}
{{- end -}}
{{- list $command $args | compact | join " " -}}
{{- end -}}

{{/* The variables of `given` (its `key`), filled in. Of two entries of one name the later counts, as in a container. */}}
{{- define "raytrain.variables" -}}
{{- $entries := dict -}}
{{- $names := list -}}
{{- range $given := .given -}}
{{- $entry := dict "name" $given.name -}}
{{- if $given.valueFrom -}}
{{- $_ := set $entry "valueFrom" $given.valueFrom -}}
{{- else -}}
{{- $text := include "raytrain.text" (dict "key" (printf "%s %s" $.key $given.name) "value" $given.value) -}}
{{- $_ := set $entry "value" (tpl $text $.root) -}}
{{- end -}}
{{- $names = append (without $names $given.name) $given.name -}}
{{- $_ := set $entries $given.name $entry -}}
{{- end -}}
{{- $list := list -}}
{{- range $names -}}
{{- $list = append $list (get $entries .) -}}
{{- end -}}
{{- printf "%s\n" (toYaml $list) -}}
{{- end -}}

{{/* Environment of the training's pods. */}}
{{- define "raytrain.env" -}}
{{- $entries := dict -}}
{{- $names := list -}}
{{- range include "raytrain.variables" (dict "root" . "key" "train.env" "given" .Values.train.env) | fromYamlArray -}}
{{- $names = append $names .name -}}
{{- $_ := set $entries .name . -}}
{{- end -}}
{{- if and .Values.pvc (not (hasKey $entries "HOME")) -}}
{{- $home := printf "%s/home/%s" ((last .Values.pvc).mount_path | trimSuffix "/") .Release.Name -}}
{{- $names = prepend $names "HOME" -}}
{{- $_ := set $entries "HOME" (dict "name" "HOME" "value" $home) -}}
{{- end -}}
{{- if not (hasKey $entries "RAY_JOB_STOP_WAIT_TIME_S") -}}
{{- /* Ray gives a stopped job 3 s, which is no time for a checkpoint and post_script. */ -}}
{{- $names = append $names "RAY_JOB_STOP_WAIT_TIME_S" -}}
{{- $_ := set $entries "RAY_JOB_STOP_WAIT_TIME_S" (dict "name" "RAY_JOB_STOP_WAIT_TIME_S" "value" "600") -}}
{{- end -}}
{{- if .Values.elastic -}}
{{- /* So that a training may ask for more workers than are there. */ -}}
{{- $names = append (without $names "RAYTRAIN_ELASTIC") "RAYTRAIN_ELASTIC" -}}
{{- $_ := set $entries "RAYTRAIN_ELASTIC" (dict "name" "RAYTRAIN_ELASTIC" "value" "1") -}}
{{- end -}}
{{- if .Values.package.fromConfigMap -}}
{{- $given := get $entries "PYTHONPATH" | default dict -}}
{{- $paths := list "/etc/tunesmith-package/tunesmith.zip" $given.value | compact -}}
{{- $names = empty $given | ternary (prepend $names "PYTHONPATH") $names -}}
{{- $_ := set $entries "PYTHONPATH" (dict "name" "PYTHONPATH" "value" (join ":" $paths)) -}}
{{- end -}}
{{- $list := list -}}
{{- range $names -}}
{{- $list = append $list (get $entries .) -}}
{{- end -}}
{{- toYaml $list -}}
{{- end -}}
