# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A script once more, in a process of its own."""

import json
import os
import subprocess
import sys

TRIED = {}  # by a smoke run: script and kind of request, and the answer


def in_fresh_process(script, request, options, **environment):
    """What the script prints when it is asked with ``--alone``, as JSON.

    Memory that is freed goes back at once, so that a peak is what a step needs and not what glibc keeps at hand.
    A smoke run starts one process for each kind of request, and takes its answer for all.
    """
    kind = script, *sorted(request)
    if options.smoke and kind in TRIED:
        return dict(TRIED[kind])
    flags = ["--smoke"] if options.smoke else []
    command = [sys.executable, script, "--alone", json.dumps(request), *flags]
    command += ["--threads", str(options.threads), "--device", options.device]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", **environment}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    TRIED[kind] = json.loads(done.stdout)
    return dict(TRIED[kind])
