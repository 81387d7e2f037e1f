{{/*
The pods: one template for the head, the workers, the submitter and the server.
Each helper takes `root`, the chart's context, and `component`: head, worker, submitter or serve.
*/}}

{{- define "raytrain.podTemplate" -}}
{{- $spec := include "raytrain.podSpec" . | fromYaml -}}
{{- with $spec.Error -}}
{{- fail (printf "the pod of the %s is no YAML: %s" $.component .) -}}
{{- end -}}
{{- $patch := (get .root.Values .component).podSpec | default dict -}}
{{- $_ := include "raytrain.merge" (dict "base" $spec "patch" $patch) -}}
metadata:
  labels:
    app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
    app.kubernetes.io/component: {{ .component }}
    sidecar.istio.io/inject: "false"
  annotations:
    {{- if ne .component "serve" }}
    karpenter.sh/do-not-disrupt: "true"
    {{- end }}
    sidecar.istio.io/inject: "false"
spec:
  {{- toYaml $spec | nindent 2 }}
{{- end -}}

{{- define "raytrain.podSpec" -}}
{{- $values := .root.Values -}}
{{- $storage := include "raytrain.storage" . | fromYaml -}}
{{- $isWorker := eq .component "worker" -}}
{{- $isServer := eq .component "serve" -}}
{{- if $isServer }}
# Of a service called tunesmith-…, variables would come that are read as settings.
enableServiceLinks: false
terminationGracePeriodSeconds: 60
{{- else }}
restartPolicy: Never
{{- end }}
{{- with $values.service_account }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with $values.image_pull_secrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  # So that a user other than root can write to the pod's own disks.
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
  {{- if eq ($values.podSecurity | default "image") "restricted" }}
  runAsNonRoot: true
  runAsUser: 1000
  {{- end }}
{{- if or $isWorker $isServer }}
{{- $resources := $isServer | ternary ($values.serve.resources | default dict) $values.resources }}
{{- with $resources.node_type }}
nodeSelector:
  node.kubernetes.io/instance-type: {{ . | quote }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- range $toleration := . }}
  - {{ include "raytrain.toleration" $toleration | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end }}
{{- if and $isWorker $values.spot }}
terminationGracePeriodSeconds: {{ int64 $values.spot.grace_period_seconds }}
{{- end }}
containers:
  - name: {{ get (dict "head" "ray-head" "worker" "ray-worker" "submitter" "ray-job-submitter" "serve" "vllm") .component }}
    image: {{ include "raytrain.image" .root | quote }}
    imagePullPolicy: {{ $values.image_pull_policy | default "IfNotPresent" }}
    securityContext: {{- include "raytrain.containerSecurity" .root | nindent 6 }}
    {{- if $isServer }}
    {{- include "raytrain.server" .root | nindent 4 }}
    {{- else }}
    env: {{- include "raytrain.env" .root | nindent 6 }}
    {{- end }}
    {{- if and (eq .component "head") $values.ray.ports }}
    ports:
      {{- range $values.ray.ports }}
      - name: {{ .name | quote }}
        containerPort: {{ int64 .port }}
      {{- end }}
    {{- end }}
    {{- if and $isWorker $values.spot }}
    lifecycle:
      preStop:
        exec:
          command: [bash, /etc/tunesmith/drain.sh, {{ int64 $values.spot.grace_period_seconds | quote }}]
    {{- end }}
    resources: {{- include "raytrain.resources" . | nindent 6 }}
    volumeMounts: {{- toYaml $storage.volumeMounts | nindent 6 }}
volumes: {{- toYaml $storage.volumes | nindent 2 }}
{{- end -}}

{{/* Of every container, Ray's autoscaler among them. */}}
{{- define "raytrain.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "raytrain.toleration" -}}
{{- $toleration := omit . "value" -}}
{{- if hasKey . "value" -}}
{{- $_ := set $toleration "value" (include "raytrain.text" (dict "key" "tolerations.value" "value" .value)) -}}
{{- end -}}
{{- toYaml $toleration -}}
{{- end -}}

{{- define "raytrain.resources" -}}
{{- $given := get (dict
      "head" .root.Values.ray.resources
      "worker" .root.Values.resources
      "submitter" (dict "requests" (dict "cpu" "100m" "memory" "256Mi") "limits" (dict "memory" "1Gi"))
      "serve" .root.Values.serve.resources
    ) .component | default dict -}}
{{- $efa := dict -}}
{{- if and (eq .component "worker") .root.Values.efa -}}
{{- $efa = dict "vpc.amazonaws.com/efa" .root.Values.efa.interfaces "hugepages-2Mi" .root.Values.efa.hugepages -}}
{{- end -}}
{{- $key := get (dict "head" "ray.resources" "serve" "serve.resources") .component | default "resources" -}}
{{- range $kind := list "requests" "limits" }}
{{ $kind }}: {{- include "raytrain.texts" (dict "key" (printf "%s.%s" $key $kind) "value" (mergeOverwrite (get $given $kind | default dict | deepCopy) $efa)) | nindent 2 }}
{{- end }}
{{- end -}}

{{/* `volumes` and `volumeMounts`, made together so that no mount is without its volume. */}}
{{- define "raytrain.storage" -}}
{{- $disks := ne .component "submitter" | ternary (include "raytrain.disks" .root | fromYamlArray) list -}}
{{- $volumes := list -}}
{{- $mounts := list -}}
{{- $hasMemory := false -}}
{{- range $disks -}}
{{- $hasMemory = or $hasMemory (eq .name "shared-memory") -}}
{{- end -}}
{{- if and (eq .component "serve") (not $hasMemory) -}}
{{- /* Where the processes of several GPUs meet; a container's own has 64 MB. */ -}}
{{- $memory := dict "emptyDir" (dict "medium" "Memory") -}}
{{- $disks = append $disks (dict "name" "shared-memory" "volume" $memory "mount" (dict "mountPath" "/dev/shm")) -}}
{{- end -}}
{{- range $disks -}}
{{- if and (eq $.component "serve") (has .name (list "job" "framework-scripts")) -}}
{{- continue -}}
{{- end -}}
{{- $volumes = append $volumes (merge (dict "name" .name) .volume) -}}
{{- $mounts = append $mounts (merge (dict "name" .name) .mount) -}}
{{- end -}}
{{- toYaml (dict "volumes" $volumes "volumeMounts" $mounts) -}}
{{- end -}}

{{/* What the head, the workers and the server mount: a list of `name`, `volume` and `mount`. */}}
{{- define "raytrain.disks" -}}
- name: job
  volume:
    configMap:
      name: {{ include "raytrain.name" . }}-job
      defaultMode: 0555
  mount: {mountPath: /etc/tunesmith, readOnly: true}
{{- with .Values.framework }}
- name: framework-scripts
  volume:
    configMap:
      name: {{ include "raytrain.name" $ }}-scripts
      defaultMode: 0555
      # A key has no slash; a folder's files lie in it again.
      items: {{- include "raytrain.scriptItems" $ | nindent 8 }}
  mount: {mountPath: /etc/framework-scripts, readOnly: true}
{{- end }}
{{- if .Values.package.fromConfigMap }}
- name: package
  volume:
    configMap:
      name: {{ include "raytrain.name" . }}-package
  mount: {mountPath: /etc/tunesmith-package, readOnly: true}
{{- end }}
{{- range $number, $claim := .Values.pvc }}
- name: pv-{{ add1 $number }}
  volume:
    persistentVolumeClaim:
      claimName: {{ $claim.name | quote }}
  mount:
    mountPath: {{ $claim.mount_path | quote }}
{{- end }}
{{- with .Values.ebs }}
- name: ebs
  volume:
    ephemeral:
      volumeClaimTemplate:
        spec:
          accessModes: [ReadWriteOnce]
          {{- with .storage_class }}
          storageClassName: {{ . | quote }}
          {{- end }}
          resources:
            requests:
              storage: {{ include "raytrain.text" (dict "key" "ebs.storage" "value" .storage) | quote }}
  mount:
    mountPath: {{ .mount_path | quote }}
{{- end }}
{{- with .Values.scratch }}
- name: scratch
  volume:
    emptyDir:
      {{- with .size_limit }}
      sizeLimit: {{ include "raytrain.text" (dict "key" "scratch.size_limit" "value" .) | quote }}
      {{- else }} {}
      {{- end }}
  mount:
    mountPath: {{ .mount_path | quote }}
{{- end }}
{{- with .Values.shared_memory }}
- name: shared-memory
  volume:
    emptyDir:
      medium: Memory
      sizeLimit: {{ include "raytrain.text" (dict "key" "shared_memory" "value" .) | quote }}
  mount:
    mountPath: /dev/shm
{{- end }}
{{- end -}}

{{/* Merges `patch` into `base`, which it changes, as a strategic merge patch of Kubernetes does. */}}
{{- define "raytrain.merge" -}}
{{- $base := .base -}}
{{- $ids := dict "containers" "name" "initContainers" "name" "env" "name" "volumes" "name"
      "volumeMounts" "mountPath" "ports" "containerPort" "imagePullSecrets" "name" -}}
{{- range $key, $value := .patch -}}
{{- $old := get $base $key -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $base $key -}}
{{- else if and (kindIs "map" $value) (kindIs "map" $old) -}}
{{- $_ := include "raytrain.merge" (dict "base" $old "patch" $value) -}}
{{- else if and (hasKey $ids $key) (kindIs "slice" $value) (kindIs "slice" $old) -}}
{{- $id := get $ids $key -}}
{{- range $item := $value -}}
{{- $found := false -}}
{{- range $old -}}
{{- if eq (get . $id | toJson) (get $item $id | toJson) -}}
{{- $_ := include "raytrain.merge" (dict "base" . "patch" $item) -}}
{{- $found = true -}}
{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- $old = append $old $item -}}
{{- end -}}
{{- end -}}
{{- $_ := set $base $key $old -}}
{{- else -}}
{{- $_ := set $base $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
