# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
Ten cases where RenyiELBO is wrong
==================================

Pyro's ``RenyiELBO(alpha=0)`` is meant to be the importance weighted bound. It is, where every site lies in one plate
that shows all of its elements and every latent is reparameterised. Here are the ten cases in which it is not, silently
in most of them, each beside what is right and beside ``ImportanceWeightedELBO``. ± is one standard error over repeats.
"""

import logging
import math
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal
from showing import BLUE, GREY, ORANGE, Example, mean_and_error, shown

from pyro_iwae import ImportanceWeightedELBO, exact

example = Example(__doc__)
logging.disable(logging.INFO)  # RenyiELBO tells what it guesses,
warnings.filterwarnings("ignore", "Found vars in model but not guide")  # and that summed out sites are not in the guide
found = {}


def renyi(num_particles, nesting=1):
    return RenyiELBO(alpha=0, num_particles=num_particles, vectorize_particles=True, max_plate_nesting=nesting)


def compare(case, right, K, *args):
    """Bounds by both, beside what is right."""
    found[case] = {}
    for loss in (renyi(K), ImportanceWeightedELBO(num_particles=K)):
        repeats = example.progress(f"{case}, {type(loss).__name__}", range(example.size(100, 5)))
        found[case][type(loss).__name__] = -torch.tensor([loss.loss(*args) for _ in repeats]) - right
    print(f"right {right:.2f}", *(f"{name} {shown(error + right)}" for name, error in found[case].items()), sep="   ")


# %%
# 1. A plate that is subsampled
# -----------------------------
# The scale N / B belongs outside the logarithm. Inside it, what comes out is no bound: it passes the evidence.


def model(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def guide(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as i:
        pyro.sample("z", dist.Normal(x[i] / 2 + 0.5**0.5, 0.5**0.5))  # the posterior, one standard deviation off


x = torch.linspace(-3.0, 3.0, 100)
gaussian = exact.Gaussian(data=x, offset=1.0)
print(f"log evidence {gaussian.log_evidence.sum():.2f}")
compare("1. subsampled plate", gaussian.bound(100).sum().item(), 100, model, guide, x, 10)

# %%
# 2. Joint autoguides
# -------------------
# Their one latent lies outside the plate. RenyiELBO subtracts its log q once for each element. Right is one weight for
# all elements, here by hand.


def by_hand(model, guide, K, *args):
    """The log-mean-exp of K weights from K traces."""
    log_weights = []
    for _ in range(K):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
        log_weights.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
    return torch.stack(log_weights).logsumexp(0) - math.log(K)


few = torch.linspace(-2.0, 2.0, 10)
print(f"log evidence {exact.Gaussian(data=few).log_evidence.sum():.2f}")
for autoguide in (AutoMultivariateNormal(model), AutoIAFNormal(model)):
    with torch.no_grad():
        right = mean_and_error([by_hand(model, autoguide, 10, few) for _ in range(example.size(100, 3))])
    name = type(autoguide).__name__
    print(f"{name}, by hand {right[0]:.2f} ± {right[1]:.2f}")
    compare(f"2. {name}", right[0], 10, model, autoguide, few)

# %%
# 3. Sites that are not reparameterised
# -------------------------------------
# RenyiELBO multiplies their term by alpha, that is by 0. Here they get a score-function gradient, OVIS.

logit = torch.tensor(-1.0, requires_grad=True)
exact.Bernoulli(logit=logit).bound(8).backward()
coin = exact.Bernoulli()


def coin_guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(-1.0))))


def derivative(loss):
    """Of the bound by the guide's logit."""
    pyro.clear_param_store()
    loss.loss_and_grads(coin.model, coin_guide)
    found = pyro.param("logit").unconstrained().grad
    return 0.0 if found is None else -found.item()


for name, loss in {"RenyiELBO": renyi(8, 0), "ImportanceWeightedELBO": ImportanceWeightedELBO(num_particles=8)}.items():
    gradients = [derivative(loss) for _ in range(example.size(500, 20))]
    print(f"derivative by the logit, {name}: {shown(gradients, 4)} (right {logit.grad:.4f})")

# %%
# 4. and 5. Which plates are independent
# --------------------------------------
# RenyiELBO keeps the dimensions that every site has, in a plate of one and the same name. A ``deterministic`` outside
# the plate, or a second name, ends that, and all elements get one weight.


def summarised(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.deterministic("mean", z.mean(-1))


def renamed(x):
    with pyro.plate("za", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("xa", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def renamed_guide(x):
    with pyro.plate("za", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + 0.5**0.5, 0.5**0.5))


right = exact.Gaussian(data=few, offset=1.0).bound(10).sum().item()
compare("4. deterministic outside", right, 10, summarised, guide, few)
compare("5. two names", right, 10, renamed, renamed_guide, few)

# %%
# 6. One minibatch for a step
# ---------------------------
# Particles that run one after the other are to see the same rows; each of RenyiELBO's draws its own. (The first call
# looks at model and guide, and runs them more often.)

shown_rows = set()


def watched(x, batch):
    with pyro.plate("data", len(x), subsample_size=batch) as i:
        shown_rows.add(tuple(i.tolist()))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


one_by_one = RenyiELBO(alpha=0, num_particles=16), ImportanceWeightedELBO(16, vectorize_particles=False)
for loss in one_by_one:
    loss.loss(watched, guide, few, 2)
    shown_rows.clear()
    loss.loss(watched, guide, few, 2)
    print(f"minibatches in a step of {type(loss).__name__}: {len(shown_rows)}")

# %%
# 7. Impossible elements
# ----------------------
# A log weight of -inf is legal. Where all particles of an element have it, the bound is -inf, and the gradient of that
# element 0: the others go on training. A warning names the site.


def half_impossible(x):
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(0.0, pyro.param("width", torch.tensor(1.0))))
        pyro.factor("possible", torch.where(x > 0, 0.0 * z, -math.inf))


def half_guide(x):
    with pyro.plate("data", 2):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))


for loss in (renyi(4), ImportanceWeightedELBO(num_particles=4)):
    pyro.clear_param_store()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss.loss_and_grads(half_impossible, half_guide, torch.tensor([1.0, -1.0]))
    print(f"{type(loss).__name__}: gradient of loc {pyro.param('loc').grad.item():.3f}")
print(f"  with the warning: {str(caught[-1].message)[:82]} ...")

# %%
# 8. Enumerated sites
# -------------------
# RenyiELBO counts the prior of each value, and does not sum out. Right is the log evidence, less very little.


def mixture(x):
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 2.0 * kind, 1.0), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


one = torch.tensor([0.5])
parts = dist.MixtureSameFamily(
    dist.Categorical(torch.tensor([0.7, 0.3])), dist.Normal(torch.tensor([0.0, 2.0]), 2**0.5)
)
compare("8. enumerated site", parts.log_prob(one).item(), 200, mixture, wide, one)

# %%
# 9. and 10. The object itself
# ----------------------------
# As a module, for torch's optimisers; and one object on a second model with more plates.


def flat():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def deep():
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def attempt(call):
    """What it gives, or the kind of its error."""
    try:
        return f"{float(call()) + 0.0:.1f}"  # no -0.0
    except (AttributeError, ValueError) as error:
        return type(error).__name__


for loss in (RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True), ImportanceWeightedELBO(num_particles=4)):
    as_module = attempt(lambda loss=loss: loss(flat, flat)())
    loss.loss(flat, flat)
    deeper = attempt(lambda loss=loss: loss.loss(deep, deep))
    print(f"{type(loss).__name__}: as a module {as_module}, on a deeper model {deeper} (right: 0.0 and 0.0)")

# %%
# All bounds together
# -------------------

fig, ax = plt.subplots(figsize=(8, 3.8))
looks = {"RenyiELBO": (ORANGE, "s", -0.1), "ImportanceWeightedELBO": (BLUE, "o", 0.1)}
for name, (colour, marker, shift) in looks.items():
    means, errors = zip(*(mean_and_error(case[name]) for case in found.values()), strict=True)
    places = [i + shift for i in range(len(found))]
    ax.errorbar(means, places, xerr=[2 * e for e in errors], color=colour, marker=marker, ls="", capsize=3, label=name)
ax.axvline(0.0, color=GREY, lw=1)
ax.set_xscale("symlog", linthresh=1.0)
ax.set_yticks(range(len(found)), list(found))
ax.invert_yaxis()
ax.set(xlabel="bound minus what is right (nats; linear between -1 and 1), ± two standard errors")
ax.legend(loc="lower left", fontsize="small")
example.save(fig, "from_renyi_elbo")
example.end()
