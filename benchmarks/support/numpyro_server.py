# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""The models of ``problems`` in NumPyro; a process of its own, which answers requests, one line of JSON each.

Run as a script by ``numpyro_peers``, never imported: nothing of PyTorch shall be in its memory.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

with contextlib.suppress(AttributeError):  # XLA takes as many threads as there are cores to be had; Linux
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, RenyiELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal


def schools(effects, errors):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(effects)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effects", dist.Normal(theta, errors), obs=effects)


def regression(t, y):
    mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    tau = numpyro.sample("tau", dist.HalfCauchy(jnp.ones(2)).to_event(1))
    with numpyro.plate("groups", len(t)):
        line = numpyro.sample("line", dist.Normal(mu, tau).to_event(1))
        numpyro.sample("y", dist.Normal(line[..., :1] + line[..., 1:] * t, 1.0).to_event(1), obs=y)


def network(name, weights, x):
    """Layers with tanh between them."""
    own = {key: numpyro.param(key, value) for key, value in weights.items() if key.startswith(name)}
    numbers = sorted({int(key.split(".")[1]) for key in own})
    for i in numbers:
        x = x @ own[f"{name}.{i}.weight"].T + own[f"{name}.{i}.bias"]
        x = jnp.tanh(x) if i != numbers[-1] else x
    return x


def autoencoder(weights):
    def model(x):
        latents = weights["decoder.0.weight"].shape[1]
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latents), 1.0).to_event(1))
            logits = network("decoder", weights, z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        loc, log_scale = jnp.split(network("encoder", weights, x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


class Peer:
    """A jitted step, alone or many in one scan, and the state that it goes on from."""

    def __init__(self, problem, arrays, particles, work, steps, scale):
        arrays = {name: jnp.asarray(value) for name, value in np.load(arrays).items()}
        args = [arrays[name] for name in sorted(arrays) if name.startswith("arg")]
        named = {name.split(":", 1)[1]: value for name, value in arrays.items() if ":" in name}
        if problem == "VAE":
            model, guide = autoencoder(named)
        else:
            model = {"eight schools": schools, "regression": regression}[problem]
            guide = AutoNormal(model, init_loc_fn=init_to_value(values=named), init_scale=scale)
        loss = RenyiELBO(alpha=0, num_particles=particles)
        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
        self.state, self.steps = svi.init(jax.random.PRNGKey(0), *args), steps
        if work == "gradient":
            parameters = svi.optim.get_params(self.state.optim_state)

            def gradient(key, parameters, *args):
                return loss.loss(key, svi.constrain_fn(parameters), model, guide, *args)

            @jax.jit
            def step(state, *args):
                key, rest = jax.random.split(state.rng_key)
                value, slope = jax.value_and_grad(gradient, argnums=1)(key, parameters, *args)
                return state._replace(rng_key=rest), value, slope

            self.run = lambda state: step(state, *args)
        elif steps == 1:
            update = jax.jit(svi.update)
            self.run = lambda state: update(state, *args)
        else:

            @jax.jit
            def many(state, *args):
                state, losses = jax.lax.scan(lambda s, _: svi.update(s, *args), state, None, length=steps)
                return state, losses[0]

            self.run = lambda state: many(state, *args)

    def step(self):
        """Seconds for each step."""
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.run(self.state))[0]
        return (time.perf_counter() - start) / self.steps

    def losses(self, count):
        """All at the parameters as they are now."""
        keys = jax.random.split(jax.random.PRNGKey(1), count)
        return [float(self.run(self.state._replace(rng_key=key))[1]) for key in keys]


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def extra_memory(call):
    """As ``memory.extra_memory``, which would bring in PyTorch. The call should make the peer, too: what a step has
    held once, XLA keeps."""
    if jax.default_backend() != "cpu":
        return None
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    peers = {}

    def make(name, **options):
        """Seconds until the first loss is there; the state stays that of the start."""
        start = time.perf_counter()
        peers[name] = Peer(**options)
        peers[name].losses(1)
        return time.perf_counter() - start

    def memory(name, **options):
        make(name, **{**options, "particles": 2})
        return extra_memory(lambda: make(name, **options))

    does = {
        "versions": lambda: {"numpyro": numpyro.__version__, "jax": jax.__version__},
        "make": make,
        "step": lambda name: peers[name].step(),
        "losses": lambda name, count: peers[name].losses(count),
        "memory": memory,
        "forget": lambda: peers.clear(),
    }
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(does[request.pop("do")](**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
