# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""
Does the evidence find anomalies better than the ELBO?
======================================================

A density model that knows normal rows only gives the others a low log p(x). That is not at hand; the ELBO is, and so is
a near estimate of the log evidence from many particles. Both are tried as scores on measurements of tumours: the model
is trained on benign ones, and malignant ones have to be found. The evidence is what the question asks for; whether it
is the better detector is another matter, and here it is not. Why not, tells the gap between the two.
"""

import math
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from showing import BLUE, GREEN, GREY, ORANGE, Example, shown
from sklearn.covariance import EmpiricalCovariance
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_curve
from torch import nn

from pyro_iwae import ImportanceWeightedELBO, evaluate

example = Example(__doc__)

# %%
# One model, trained twice
# ------------------------
# Of the 357 benign rows 200 are for training; the others are mixed with 212 malignant ones. All measurements are positive
# and skewed, so their logarithms are modelled. Means and standard deviations are those of the training rows. The two
# autoencoders start from the same parameters and differ in the loss alone.

data = load_breast_cancer()
logs = torch.tensor(np.log1p(data.data), dtype=torch.float)
benign, malignant = logs[data.target == 1], logs[data.target == 0]
training, normal = benign[torch.randperm(len(benign))].split([200, 157])
loc, scale = training.mean(0), training.std(0)
training, normal, odd = ((rows - loc) / scale for rows in (training, normal, malignant))
scored, columns, latents, hidden = torch.cat([normal, odd]), 30, 2, 32


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(columns, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, columns))
        self.log_scale = nn.Parameter(torch.zeros(columns))

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("rows", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


vaes = {}
for name, loss in {
    "ELBO": Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1),
    "bound": ImportanceWeightedELBO(num_particles=10),
}.items():
    pyro.clear_param_store()
    pyro.set_rng_seed(example.seed)
    vaes[name] = vae = VAE()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    example.train(svi, [(rows,) for rows in training.split(100)], epochs=example.size(60, 2), what=f"VAE by {name}")

# %%
# Scores
# ------
# The ELBO is the mean of the log weights, the bound the log of the mean weight, here both from the same hundred particles;
# one particle alone is the cheapest. :func:`~pyro_iwae.evaluate` has the log evidence from 2,000. The baselines are the
# Mahalanobis distance, which is the log density of one Gaussian, and an isolation forest, fitted to the training rows.

scores, milliseconds, evaluations, K = {}, {}, {}, example.size(500, 20)


def add(name, log_density):
    """A score, the higher the odder. It is timed at the second call, as the first one looks model and guide over."""
    log_density()
    start = time.perf_counter()
    scores[name] = -torch.as_tensor(log_density(), dtype=torch.double)
    milliseconds[name] = 1000 * (time.perf_counter() - start) / len(scored)


def weights(model, guide, num_particles):
    elbo = ImportanceWeightedELBO(num_particles=num_particles)
    return lambda: elbo.log_weights(model, guide, scored).log_weights.detach()


def log_evidence(name, model, guide):
    evaluations[name] = evaluate(model, guide, scored, num_particles=K, num_replicates=4, progress=False)
    return evaluations[name].log_evidence


gauss, forest = EmpiricalCovariance().fit(training), IsolationForest(random_state=example.seed).fit(training)
add("Mahalanobis distance", lambda: -gauss.mahalanobis(scored))
add("isolation forest", lambda: forest.score_samples(scored))
for name, vae in vaes.items():
    one, hundred = (weights(vae.model, vae.guide, count) for count in (1, 100))
    add(f"{name}: ELBO, 1 particle", lambda: one()[0])
    add(f"{name}: ELBO, 100 particles", lambda: hundred().mean(0))
    add(f"{name}: bound, K = 100", lambda: hundred().logsumexp(0) - math.log(100))
    add(f"{name}: log evidence", partial(log_evidence, name, vae.model, vae.guide))

# %%
# How well do they tell?
# ----------------------
# The area under the ROC curve is the share of pairs in which the malignant row has the higher score; its error is that of
# DeLong, DeLong and Clarke-Pearson (1988). The share of benign rows that are called odd, at the threshold that finds 95 % of
# the malignant ones, has its error from a thousand bootstrap replicates. Both are over rows; they do not hold what changes
# from training run to training run.

resampled = torch.randint(len(normal), (1000, len(normal))), torch.randint(len(odd), (1000, len(odd)))


def placed(score):
    """Of each benign row, the share of malignant ones above it; of each malignant row, that of benign ones below."""
    ordinary, strange = score[: len(normal)], score[len(normal) :]
    above = (strange > ordinary[:, None]).double() + 0.5 * (strange == ordinary[:, None])
    return above.mean(1), above.mean(0)


def area(parts):
    return parts[0].mean(), sum(part.var() / len(part) for part in parts).sqrt()


def false_positives(score):
    ordinary, strange = score[: len(normal)], score[len(normal) :]
    called = (ordinary[resampled[0]] > strange[resampled[1]].quantile(0.05, 1, keepdim=True)).double().mean(1)
    return (ordinary > strange.quantile(0.05)).double().mean(), called.std()


print(f"{len(normal)} benign and {len(odd)} malignant rows, ± standard error over rows\n")
print("score                      area under ROC curve   benign called odd (%)   milliseconds per row")
for name, score in scores.items():
    auc, (share, error) = "{:.3f} ± {:.3f}".format(*area(placed(score))), false_positives(score)
    print(f"{name:25}  {auc:>20}   {100 * share:14.1f} ± {100 * error:4.1f}   {milliseconds[name]:20.3f}")

# %%
# PLACE

print("\nArea under the ROC curve, that of the first minus that of the second, paired by row\n")
for first, second in (
    ("ELBO: log evidence", "ELBO: ELBO, 100 particles"),
    ("bound: log evidence", "bound: ELBO, 100 particles"),
    ("bound: log evidence", "ELBO: ELBO, 100 particles"),
    ("bound: log evidence", "ELBO: log evidence"),
    ("bound: log evidence", "isolation forest"),
):
    apart = [one - other for one, other in zip(placed(scores[first]), placed(scores[second]), strict=True)]
    print("{:20} - {:26}   {:6.3f} ± {:.3f}".format(first, second, *area(apart)))

# %%
# The model, or the guide?
# ------------------------
# ELBO = log evidence - KL(guide || posterior). The encoder has met benign rows only, and on the others it need not be near the
# posterior: the gap is a part of the ELBO's score that says nothing of the model. It also makes the evidence hard to
# estimate, and the report of :func:`~pyro_iwae.evaluate` says so. What does the model itself say? Hold it, and give
# each row that is scored a guide of its own.

vae = vaes["bound"].eval().requires_grad_(False)
pyro.clear_param_store()
own = AutoNormal(vae.model, init_scale=0.1)
svi = SVI(vae.model, own, pyro.optim.Adam({"lr": 0.03}), loss=ImportanceWeightedELBO(num_particles=10))
example.train(svi, [(scored,)], epochs=example.size(300, 5), what="guide by row")
add("own guide: log evidence", partial(log_evidence, "own guide", vae.model, own))
print("                         log evidence (nats)       gap to the ELBO (nats)    trusted (%)      area under")
print("guide                    benign     malignant      benign     malignant   benign  malignant   ROC curve")
for name, found in evaluations.items():
    columns_of = [q.split([len(normal), len(odd)]) for q in (found.log_evidence, found.log_evidence - found.elbo)]
    cells = "".join(f"{shown(part, 1):>15}" for column in columns_of for part in column)
    trusted = "{:9.0f}{:9.0f}".format(*(100 * t.double().mean() for t in found.trusted.split([len(normal), len(odd)])))
    print(f"{name:15}{cells}{trusted}" + "     {:.3f} ± {:.3f}".format(*area(placed(scores[f"{name}: log evidence"]))))

# %%
# PLACE2

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
for name, colour, line in (
    ("isolation forest", GREY, ":"),
    ("ELBO: ELBO, 100 particles", BLUE, "-."),
    ("bound: ELBO, 100 particles", GREEN, "--"),
    ("bound: log evidence", ORANGE, "-"),
):
    false, true, _ = roc_curve(np.repeat([0, 1], [len(normal), len(odd)]), scores[name])
    left.plot(100 * false, 100 * true, color=colour, ls=line, label=name)
left.axhline(95, color=GREY, lw=0.8)
left.set(xlabel="benign rows called odd (%)", ylabel="malignant rows found (%)", ylim=(50, 101))
left.legend(loc="lower right")
found = evaluations["bound"]
gap = (found.log_evidence - found.elbo).split([len(normal), len(odd)])
for label, colour, marker, e, g in zip(
    ("benign", "malignant"), (BLUE, ORANGE), "ox", found.log_evidence.split([len(normal), len(odd)]), gap, strict=True
):
    right.plot(-e, g, marker, color=colour, ms=4, label=label)
right.set(xscale="log", yscale="log")
right.set(xlabel="minus log evidence (nats)", ylabel="log evidence - ELBO (nats)", title="VAE trained with the bound")
right.legend(loc="upper left")
example.save(fig, "scores")
example.end()
