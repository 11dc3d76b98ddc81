#!/usr/bin/env bash
# A JobSet for TPU slices of a GKE cluster: prints its manifest, or applies it.
#
#   launch/gke.sh [options] -- --config FILE.py[:ARG] --workdir gs://BUCKET/RUN [--config.a=b …]
#
# --name NAME              of the JobSet (lmjax)
# --image IMAGE            a container with lmjax, its '.[tpu,gcs]', and the experiment where --config says
# --accelerator NAME       as tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice
# --topology AxB[xC]       chips of a slice, as the node pool has them
# --chips N                of one host (4)
# --slices N               (1)
# --spot                   on nodes that may be taken away
# --namespace NAME         (kubectl's)
# --service_account NAME   of Kubernetes, that may use the bucket
# --queue NAME             a LocalQueue of Kueue
# --restarts N             how often the JobSet is started again (100)
# --module NAME            the command: python -m NAME (lmjax.main)
# --apply                  kubectl apply, instead of printing
# --dry_run                with --apply: print the command that would be run
#
# The cluster needs JobSet 0.6 or newer.  All pods are started again when one leaves with 75, is killed (137, 143) or
# loses its node; with any other code the JobSet has failed.  A pod that must go has two minutes to save.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=options.sh
. "$(dirname "$0")/options.sh"

declare -A o=([name]=lmjax [image]='' [accelerator]='' [topology]='' [chips]=4 [slices]=1 [spot]=no [namespace]=''
  [service_account]='' [queue]='' [restarts]=100 [module]=lmjax.main [apply]=no [dry_run]=no)
read_options "$@"
need image accelerator topology
number chips 1 && number slices 1 && number restarts 0
[[ ${o[name]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  mistake "--name=${o[name]@Q} must be at most 40 of a-z, 0-9 and -, and begin with a letter"
[[ ${o[topology]} =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] ||
  mistake "--topology=${o[topology]@Q} is not like 4x4 or 2x2x4"
((${#arguments[@]})) || mistake 'nothing stands behind --: what is to run?'
utf8 "${o[@]}" "${arguments[@]}"
all=$((${o[topology]//x/*}))
each=$((all < o[chips] ? all : o[chips]))
((all % each == 0)) || mistake "the $all chips of ${o[topology]} are no whole number of hosts of $each (--chips)"

command=(python -m "${o[module]}" "${arguments[@]}")
words=''
# Kubernetes reads $(NAME) as a variable, and $$ as $.
for word in "${command[@]}"; do words+="${words:+, }$(json "${word//\$/\$\$}")"; done

manifest() {
  local metadata='' selector='' pod=''
  [[ ! ${o[namespace]} ]] || metadata+=$'\n'"  namespace: $(json "${o[namespace]}")"
  [[ ! ${o[queue]} ]] || metadata+=$'\n'"  labels: {kueue.x-k8s.io/queue-name: $(json "${o[queue]}")}"
  [[ ${o[spot]} == no ]] || selector=$'\n              cloud.google.com/gke-spot: "true"'
  [[ ! ${o[service_account]} ]] || pod=$'\n'"            serviceAccountName: $(json "${o[service_account]}")"
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${o[name]}$metadata
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: ${o[restarts]}
    rules:
    - name: failed
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: ${o[slices]}
    template:
      spec:
        parallelism: $((all / each))
        completions: $((all / each))
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: lmjax, operator: NotIn, values: [75, 137, 143]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120$pod
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "${o[accelerator]}")
              cloud.google.com/gke-tpu-topology: ${o[topology]}$selector
            containers:
            - name: lmjax
              image: $(json "${o[image]}")
              command: [$words]
              resources:
                requests: {google.com/tpu: $each}
                limits: {google.com/tpu: $each}
YAML
}

yaml=$(manifest)
if [[ ${o[apply]} == no ]]; then
  printf '%s\n' "$yaml"
elif [[ ${o[dry_run]} == yes ]]; then
  printf 'kubectl apply -f - <<< %q\n' "$yaml"
else
  type -P kubectl > /dev/null || mistake 'there is no kubectl here'
  kubectl apply -f - <<< "$yaml"
fi
