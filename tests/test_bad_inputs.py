# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""A table of wrong arguments of every public function: what is said of each, and that nothing is left behind.

Models and guides that do not fit, and numbers that are none, are in ``test_errors``.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.util import get_rng_state

from pyro_iwae import (
    CIWAE,
    MIWAE,
    PIWAE,
    TVO,
    Checkpoint,
    CompiledSVI,
    DoublyReparameterized,
    Evaluation,
    ImportanceResampledGuide,
    ImportanceWeightedELBO,
    LogWeights,
    Monitor,
    Renyi,
    SampledBackward,
    StickTheLanding,
    citation,
    diagnostics,
    evaluate,
    evidence,
    gradient_snr,
    plots,
    preflight,
    to_inference_data,
    tradeoff,
)
from tests.conftest import host_state
from tests.test_compiled import recorded_only  # noqa: F401  (a fixture)
from tests.test_errors import DATA, guide, model, raises_cleanly

pytestmark = pytest.mark.usefixtures("unchecked")


def elbo(**options):
    return ImportanceWeightedELBO(**{"num_particles": 3, **options})


def posterior(**options):
    return ImportanceResampledGuide(model, guide, **{"num_particles": 3, **options})


def evaluated(**options):
    settings = {"num_particles": 4, "num_replicates": 2, "progress": False}
    return evaluate(model, guide, **{**settings, **options})


def compared(**options):
    return tradeoff(model, guide, **{"ks": [1, 2], "progress": False, **options})


def held(**options):
    return to_inference_data(posterior(), num_draws=8, **options)


def compiled(**options):
    return CompiledSVI(
        **{"model": model, "guide": guide, "optim": pyro.optim.Adam({"lr": 0.1}), "loss": elbo(), **options}
    )


HUGE, CHUNK = 10**15, rf"pass chunk_size= below {10**15} \(without compile\), or lower num_particles"
FLOATS, GRID = "expected log_weights to be a tensor of floating point numbers, got", torch.linspace(0.0, 1.0, 5)
PARTICLE = r"shape \(particles, \*plates\), with a particle at least, got"
WHOLE, CALLABLE = "to be a whole number, got ", "to be callable"
NOT_CALLED = [
    # ELBO
    ("K below one", lambda: elbo(num_particles=0), ValueError, "num_particles >= 1, got 0"),
    ("K is NaN", lambda: elbo(num_particles=math.nan), TypeError, f"num_particles {WHOLE}nan"),
    ("K is text", lambda: elbo(num_particles="3"), TypeError, f"num_particles {WHOLE}'3'"),
    ("K is a switch", lambda: elbo(num_particles=True), TypeError, f"num_particles {WHOLE}True"),
    ("K of 30 digits", lambda: elbo(num_particles=10**30), ValueError, "num_particles <= .*, got 10{30}"),
    ("chunk of none", lambda: elbo(chunk_size=0), ValueError, "chunk_size >= 1, got 0"),
    ("chunk is a fraction", lambda: elbo(chunk_size=2.5), TypeError, f"chunk_size {WHOLE}2.5"),
    (
        "chunks and combine",
        lambda: elbo(chunk_size=2, plate_particles="auto", combine=True),
        NotImplementedError,
        "combine=False, or leave",
    ),
    ("chunks and compile", lambda: elbo(chunk_size=2, compile=True), ValueError, "write compile=False"),
    ("plates by a number", lambda: elbo(plate_particles=3), TypeError, r"as in {'data': 64}, or 'auto', got 3"),
    ("plates by a word", lambda: elbo(plate_particles="all"), TypeError, "or 'auto', got 'all'"),
    ("plates by numbers", lambda: elbo(plate_particles={3: 2}), TypeError, r"got {3: 2}"),
    ("a plate's K", lambda: elbo(plate_particles={"data": 0}), ValueError, r"plate_particles\['data'\] >= 1, got 0"),
    ("a plate's half K", lambda: elbo(plate_particles={"data": 2.5}), TypeError, rf"\['data'\] {WHOLE}2.5"),
    ("objective", lambda: elbo(objective="renyi"), TypeError, r"objective such as Renyi\(0.5\).*got 'renyi'"),
    ("objective's class", lambda: elbo(objective=MIWAE), TypeError, "expected objective to be an objective such as"),
    ("gradient", lambda: elbo(gradient="dreg"), TypeError, r"such as Pathwise\(\).*got 'dreg'"),
    ("score", lambda: elbo(score="vimco"), TypeError, r"such as OVIS\(\).*got 'vimco'"),
    ("combine", lambda: elbo(combine="yes"), TypeError, "combine to be True or False, got 'yes'"),
    ("warning", lambda: elbo(strict_enumeration_warning="x"), TypeError, "enumeration_warning to be True or False"),
    ("retain_graph", lambda: elbo(retain_graph="x"), TypeError, "retain_graph to be True or False, got 'x'"),
    ("compile", lambda: elbo(compile="yes"), TypeError, "compile to be True or False, got 'yes'"),
    ("vectorize", lambda: elbo(vectorize_particles=2), TypeError, "None, True or False, got 2"),
    ("nesting", lambda: elbo(max_plate_nesting=-1), ValueError, "max_plate_nesting >= 0, got -1"),
    ("a group without torchrun", lambda: elbo(process_group="w"), ValueError, "init_process_group"),
    ("an option of no such name", lambda: elbo(particles=3), TypeError, "unexpected keyword argument 'particles'"),
    ("draws below chunk", lambda: elbo(gradient=SampledBackward(draws=3), chunk_size=2), ValueError, "chunk_size >= 3"),
    # Objectives and gradients
    ("no group", lambda: MIWAE(0), ValueError, "groups >= 1, got 0"),
    ("groups", lambda: PIWAE("a"), TypeError, f"groups {WHOLE}'a'"),
    ("beta above one", lambda: CIWAE(2.0), ValueError, r"between 0 \(the bound\) and 1 \(the ELBO\), got 2.0"),
    ("beta", lambda: CIWAE("a"), TypeError, "beta to be a number, got 'a'"),
    ("beta is NaN", lambda: CIWAE(math.nan), ValueError, "expected beta between"),
    ("betas", lambda: TVO(0.5), TypeError, r"betas to be several numbers, as in \(0.0, 0.5\), got 0.5"),
    ("no betas", lambda: TVO(()), ValueError, r"rise from 0 and stay below 1, got \(\)"),
    ("betas that fall", lambda: TVO((0.0, 0.5, 0.2)), ValueError, "expected betas that rise"),
    ("betas of text", lambda: TVO(("a",)), TypeError, "betas to be a number, got 'a'"),
    ("alpha", lambda: Renyi("a"), TypeError, "alpha to be a number, got 'a'"),
    ("infinite alpha", lambda: Renyi(math.inf), ValueError, "within a million.*got inf"),
    ("alpha beyond a million", lambda: Renyi(1e300), ValueError, "within a million of it, got 1e\\+300"),
    ("draws", lambda: SampledBackward(draws=0), ValueError, "draws >= 1, got 0"),
    # Guide
    ("guide's K", lambda: posterior(num_particles=0), ValueError, "num_particles >= 1, got 0"),
    ("guide's model", lambda: ImportanceResampledGuide(None, guide), TypeError, f"model {CALLABLE}.*got None"),
    ("guide's guide", lambda: ImportanceResampledGuide(model, 3), TypeError, f"guide {CALLABLE}.*got 3"),
    ("no draw", lambda: posterior().sample(0), ValueError, "num_draws >= 1, got 0"),
    ("half draws", lambda: posterior().sample(2.5), TypeError, f"num_draws {WHOLE}2.5"),
    ("method", lambda: posterior().sample(3, method="best"), ValueError, "method to be None or one of .*got 'best'"),
    ("methods", lambda: posterior().sample(3, method=["psis"]), ValueError, r"None or one of .*got \['psis'\]"),
    ("no function", lambda: posterior().expectation(None), TypeError, "fn to be a function of the draws.*got None"),
    ("no batch", lambda: posterior().expectation(len, num_batches=0), ValueError, "num_batches >= 1, got 0"),
    ("no values", lambda: posterior().log_density({}), ValueError, "draws to hold the model's latents, got none"),
    ("a list of values", lambda: posterior().log_density([1.0]), TypeError, "dict of tensors .*got list"),
    ("values that are no tensors", lambda: posterior().log_density({"z": 1.0}), TypeError, r"got {'z': 'float'}"),
    ("values of NaN", lambda: posterior().log_density({"z": DATA * math.nan}), ValueError, "NaN at site 'z'"),
    (
        "complex values",
        lambda: posterior().log_density({"z": DATA + 0j}),
        TypeError,
        "real numbers, got torch.complex64",
    ),
    (
        "values on no device",
        lambda: posterior().log_density({"z": DATA.to("meta")}),
        ValueError,
        "draws to hold numbers, got a tensor on the meta device at site 'z'",
    ),
    (
        "no row of values",
        lambda: posterior().log_density({"z": DATA[None][:0]}),
        ValueError,
        r"in front, got .*\(0, 3\)",
    ),
    ("one number as values", lambda: posterior().log_density({"z": DATA[0]}), ValueError, r"in front, got shape \(\)"),
    ("no companions", lambda: posterior().elbo_interval(num_batches=0), ValueError, "num_batches >= 1"),
    ("one replicate", lambda: posterior().elbo_interval(num_replicates=1), ValueError, "num_replicates >= 2"),
    # Evaluation
    ("evaluated model", lambda: evaluate(None, guide), TypeError, f"model {CALLABLE}"),
    ("evaluated K", lambda: evaluated(num_particles=0), ValueError, "num_particles >= 1"),
    ("one evaluation", lambda: evaluated(num_replicates=1), ValueError, "num_replicates >= 2, got 1"),
    ("ladder", lambda: evaluated(ks=5), TypeError, r"ks to be several numbers .*\[1, 10, 100\], got 5"),
    ("ladder from zero", lambda: evaluated(ks=[0]), ValueError, "ks >= 1, got 0"),
    ("ladder too high", lambda: evaluated(ks=[9]), ValueError, "up to num_particles=4, got 9"),
    ("unpack without data", lambda: evaluated(unpack=len), ValueError, "expected data= for unpack and row_plate"),
    ("row_plate without data", lambda: evaluated(row_plate="data"), ValueError, "expected data= for unpack and row"),
    ("evaluated chunk", lambda: evaluated(chunk_size=0), ValueError, "chunk_size >= 1, got 0"),
    ("target", lambda: evaluated(target_ess=-1), ValueError, "target_ess > 0, got -1"),
    ("target of text", lambda: evaluated(target_ess="x"), TypeError, "target_ess to be a number, got 'x'"),
    ("target is NaN", lambda: evaluated(target_std_error=math.nan), ValueError, "target_std_error > 0, got nan"),
    ("most", lambda: evaluated(max_replicates=9), ValueError, "target_ess or target_std_error beside max_replicates"),
    ("most below all", lambda: evaluated(max_replicates=1, target_ess=5), ValueError, "max_replicates >= 2, got 1"),
    ("no function of a batch", lambda: evaluated(data=[DATA], unpack="x"), TypeError, "function of a batch.*got 'x'"),
    ("exact draw", lambda: evaluated(posterior_draw=3), TypeError, "posterior_draw to be a dict of tensors .*got int"),
    ("no exact draw", lambda: evaluated(posterior_draw={}), ValueError, "posterior_draw to hold the model's latents"),
    (
        "no such folder",
        lambda: evaluated(save_to="no/such/x.npz"),
        FileNotFoundError,
        "for 'no/such/x.npz', got none; create it",
    ),
    ("seconds", lambda: evaluated(save_every=-1), ValueError, "save_every >= 0 seconds, got -1"),
    ("progress", lambda: evaluated(progress="x"), TypeError, "progress to be True or False, got 'x'"),
    ("data", lambda: evaluated(data=5), TypeError, "data to give batches of rows, got int; write data=DataLoader"),
    ("data without batches", lambda: evaluated(data=DATA), TypeError, "data to give batches of rows, got Tensor"),
    ("no batches", lambda: evaluated(data=[]), ValueError, "at least one batch, got none"),
    ("batches of numbers", lambda: evaluated(data=[1, 2]), ValueError, "a tuple or dict of tensors.*got a int"),
    ("rows by number", lambda: evaluated(data=[{1: DATA}]), TypeError, r"names of arguments, got \[1\].*unpack="),
    ("another file", lambda: evaluated(save_to=__file__), ValueError, "expected a whole file written by Evaluation"),
    (
        "exact draw on no device",
        lambda: evaluated(posterior_draw={"z": DATA.to("meta")}),
        ValueError,
        "posterior_draw to hold numbers, got a tensor on the meta device",
    ),
    ("no such file", lambda: Evaluation.load("no/such.npz"), FileNotFoundError, "such.npz"),
    ("no file", lambda: Evaluation.load(3), TypeError, "PathLike object, not int"),
    # The rest
    ("compared model", lambda: tradeoff(None, guide), TypeError, f"model {CALLABLE}"),
    ("nothing to compare", lambda: compared(ks=[1, 1]), ValueError, r"two different ks to compare, got \[1\]"),
    ("compared with nothing", lambda: compared(ks=None), TypeError, "ks to be several numbers of particles.*got None"),
    ("compared with one", lambda: compared(ks=torch.tensor(3)), TypeError, "ks to be several numbers of particles"),
    ("compared with bytes", lambda: compared(ks=b"\\x02\\x03"), TypeError, "ks to be several numbers of particles"),
    ("compared with a bar", lambda: compared(progress="x"), TypeError, "progress to be True or False, got 'x'"),
    ("compared in chunks", lambda: compared(chunk_size="x"), TypeError, f"chunk_size {WHOLE}'x'"),
    ("compared with none", lambda: compared(ks=[0, 2]), ValueError, "ks >= 1, got 0"),
    ("report", lambda: preflight(None, guide), TypeError, f"model {CALLABLE}"),
    ("signal of nothing", lambda: gradient_snr(None, model, guide), TypeError, "elbo to be an ELBO such as"),
    ("signal of no model", lambda: gradient_snr(elbo(), 3, guide, progress=False), TypeError, f"model {CALLABLE}"),
    ("few gradients", lambda: gradient_snr(elbo(), model, guide, num_replicates=1), ValueError, "num_replicates >= 20"),
    ("signal's bar", lambda: gradient_snr(elbo(), model, guide, progress="x"), TypeError, "progress to be True or Fal"),
    (
        "signal of none",
        torch.no_grad()(lambda: gradient_snr(elbo(), model, guide)),
        RuntimeError,
        "in gradient_snr, got",
    ),
    ("costs of none", torch.no_grad()(compared), RuntimeError, "gradients to be on in tradeoff, got"),
    (
        "steps of none",
        torch.inference_mode()(lambda: compiled().step()),
        RuntimeError,
        "outside of torch.inference_mode",
    ),
    ("many of none", torch.inference_mode()(lambda: compiled().run(3)), RuntimeError, "svi.evaluate_loss"),
    ("never", lambda: Monitor(model, guide, elbo(), every=0), ValueError, "every >= 1, got 0"),
    ("monitored model", lambda: Monitor(None, guide, elbo()), TypeError, f"model {CALLABLE}"),
    ("writer", lambda: Monitor(model, guide, elbo(), writer=3), TypeError, "folder for TensorBoard.*got 3"),
    ("another loss", lambda: compiled(loss=Trace_ELBO()), TypeError, "loss to be an ImportanceWeightedELBO"),
    ("no optimiser", lambda: compiled(optim=3), TypeError, "optim to be pyro.optim.Adam.*got 3"),
    ("compiled model", lambda: compiled(model=None), TypeError, f"model {CALLABLE}"),
    ("no steps", lambda: compiled().run(0), ValueError, "num_steps >= 1, got 0"),
    ("steps", lambda: compiled().run("x"), TypeError, f"num_steps {WHOLE}'x'"),
    ("steps' bar", lambda: compiled().run(2, progress="x"), TypeError, "progress to be True or False, got 'x'"),
    ("tag", lambda: Monitor(model, guide, elbo(), tag=3), TypeError, "tag to be what the figures' names begin with.*3"),
    ("path", lambda: Checkpoint(3), TypeError, "PathLike object, not int"),
    ("cited class", lambda: citation(ImportanceWeightedELBO), TypeError, "ImportanceResampledGuide or nothing"),
    ("no posterior", lambda: to_inference_data(None), TypeError, r"expected the posterior as ImportanceResampled"),
    ("no draws to hold", lambda: to_inference_data(posterior(), num_draws=0), ValueError, "num_draws >= 1, got 0"),
    ("coordinates", lambda: to_inference_data(posterior(), coords=3), TypeError, "coords to be a dict by name, got 3"),
    (
        "dimensions",
        lambda: to_inference_data(posterior(), dims=["z"]),
        TypeError,
        r"dims to be a dict by name, got \['",
    ),
    ("weights in a list", lambda: LogWeights([0.0]), TypeError, "tensor of floating point numbers, got list"),
    ("whole weights", lambda: LogWeights(torch.tensor([1])), TypeError, "floating point numbers, got torch.int64"),
    ("no weights", lambda: LogWeights(torch.zeros(0, 3)), ValueError, r"a particle at least.*got \(0, 3\)"),
    ("one weight alone", lambda: LogWeights(torch.zeros(())), ValueError, r"\(particles, \*plates\).*got \(\)"),
    # Weights alone
    ("size of a list", lambda: diagnostics.ess([0.0]), TypeError, f"{FLOATS} list"),
    ("size of LogWeights", lambda: diagnostics.ess(LogWeights(DATA)), TypeError, "of LogWeights take .log_weights"),
    ("size of none", lambda: diagnostics.ess(torch.zeros(0, 3)), ValueError, rf"{PARTICLE} \(0, 3\)"),
    ("distinct of whole numbers", lambda: diagnostics.expected_distinct(torch.arange(3), 2), TypeError, "torch.int64"),
    ("no draws of these", lambda: diagnostics.expected_distinct(DATA, -2), ValueError, "draws >= 1, got -2"),
    ("khat of whole numbers", lambda: diagnostics.pareto_khat(torch.arange(100)), TypeError, "torch.int64"),
    ("khat of none", lambda: diagnostics.pareto_khat(DATA[:0]), ValueError, rf"{PARTICLE} \(0,\)"),
    ("smoothed list", lambda: diagnostics.psis([0.0]), TypeError, f"{FLOATS} list"),
    ("bounds beyond", lambda: evidence.bounds(DATA, [9]), ValueError, "ks up to 3, the number of particles, got 9"),
    ("bounds of zero", lambda: evidence.bounds(DATA, [0]), ValueError, "ks >= 1, got 0"),
    ("bounds of one", lambda: evidence.bounds(DATA, 2), TypeError, "ks to be several numbers of particles.*got 2"),
    ("jackknife of a list", lambda: evidence.jackknife([0.0, 1.0], 1), TypeError, f"{FLOATS} list"),
    ("jackknife's order", lambda: evidence.jackknife(DATA, 3), ValueError, "order 1 or 2, got 3"),
    # Pictures
    ("picture of a list", lambda: plots.weights([0.0]), TypeError, f"{FLOATS} list"),
    ("picture of NaN", lambda: plots.weights(DATA * math.nan), ValueError, "below infinity, got NaN"),
    ("picture of no element", lambda: plots.weights(DATA, element=9), ValueError, "element below 1.*got 9"),
    ("picture of the last", lambda: plots.weights(DATA, element=-1), ValueError, "element >= 0, got -1"),
    ("line of numbers", lambda: plots.density_1d(GRID, [1]), TypeError, "log_densities as tensors by name, got list"),
    ("line's shape", lambda: plots.density_1d(GRID, {"q": DATA}), ValueError, r"'q' at each point.*\(5,\).*got \(3,\)"),
    (
        "plane of lists",
        lambda: plots.density_2d([1, 2], [1, 2], torch.zeros(2, 2)),
        TypeError,
        "as tensors by name, got {'x': 'list'",
    ),
    (
        "plane without density",
        lambda: plots.density_2d(GRID, GRID, torch.full((5, 5), -math.inf)),
        ValueError,
        "log_density with a finite number at its largest, got -inf",
    ),
    (
        "plane of NaN",
        lambda: plots.density_2d(GRID, GRID, torch.zeros(5, 5), outline=torch.full((5, 5), math.nan)),
        ValueError,
        "outline with a finite number at its largest, got nan",
    ),
    ("images in a list", lambda: plots.reconstructions([DATA]), TypeError, "rows as tensors by name, got list"),
    ("more plates", lambda: LogWeights(torch.zeros(2), ("data",)), ValueError, r"got \(2,\) and \('data',\)"),
]
CALLED = [
    (
        "groups do not part K",
        lambda: elbo(objective=MIWAE(2)).loss(model, guide),
        ValueError,
        "multiple of the 2 groups",
    ),
    ("a plate of no such name", lambda: elbo(plate_particles={"rows": 2}).loss(model, guide), ValueError, "got 'rows'"),
    ("evaluated plate", lambda: evaluated(plate_particles={"rows": 2}), ValueError, r"\['data'\], got 'rows'"),
    (
        "an exact draw's shape",
        lambda: evaluated(posterior_draw={"z": torch.zeros(7)}),
        ValueError,
        r"site 'z' in shape",
    ),
    ("too few for all", lambda: posterior().sample(9, method="without_replacement"), ValueError, "at most 3 draws"),
    ("fn of a number", lambda: posterior().expectation(lambda z: 1.0), ValueError, "particles in front"),
    ("fn that mixes", lambda: posterior().expectation(lambda z: z["z"].sum(-1)), ValueError, r"\['data'\] apart"),
    (
        "values of another site",
        lambda: posterior().log_density({"z": DATA.expand(2, 3), "q": DATA}),
        ValueError,
        r"got \['q'\]",
    ),
    ("values' shape", lambda: posterior().log_density({"z": torch.zeros(2, 5)}), ValueError, r"\(2, 3\).*got \(2, 5\)"),
    ("rows of none", lambda: elbo().loss(model, guide, DATA[:0]), ZeroDivisionError, "size cannot be zero"),  # Pyro's
    ("evaluation and a number", lambda: evaluated() + 3, TypeError, "unsupported operand"),
    ("level", lambda: evaluated().interval(2.0), ValueError, "level between 0 and 1, as in 0.95, got 2.0"),
    ("a word as level", lambda: evaluated().interval("x"), TypeError, "level to be a number, got 'x'"),
    ("worth", lambda: compared().recommend("x"), TypeError, "worth to be a number, got 'x'"),
    ("limit", lambda: compared().recommend(max_seconds="x"), TypeError, "max_seconds to be a number, got 'x'"),
    ("limit is NaN", lambda: compared().recommend(max_bytes=math.nan), ValueError, "max_bytes > 0, got nan"),
    ("dimensions of none", lambda: held(dims={"q": ["a"]}), ValueError, "dims of what was drawn or observed.*got 'q'"),
    ("numbered dimensions", lambda: held(dims={"z": [3]}), ValueError, r"names in a list for dims\['z'\], got \[3\]"),
    ("no dimensions", lambda: held(dims={"z": None}), ValueError, r"names in a list for dims\['z'\], got None"),
    ("more dimensions", lambda: held(dims={"z": ["a", "b"]}), ValueError, r"at most 1 names in a list for dims\['z'\]"),
    ("data on another device", lambda: elbo().loss(model, guide, DATA.to("meta")), RuntimeError, "meta tensors"),
    ("complex data", lambda: elbo().loss(model, guide, DATA + 0j), RuntimeError, "Complex"),
    ("data in a list", lambda: elbo().loss(model, guide, DATA.tolist()), TypeError, "list"),
    ("one number for rows", lambda: elbo().loss(model, guide, DATA[0]), TypeError, "0-d tensor"),
    ("infinite data", lambda: elbo().loss(model, guide, DATA * math.inf), ValueError, "constraint Real|NaN at model"),
    ("NaN in the data", lambda: elbo().loss(model, guide, DATA * math.nan), ValueError, "constraint Real"),
    ("K beyond memory", lambda: elbo(num_particles=HUGE).loss(model, guide), RuntimeError, f"{HUGE} .*{CHUNK}"),
    ("trained", lambda: elbo(num_particles=HUGE).loss_and_grads(model, guide), RuntimeError, f"{HUGE} .*{CHUNK}"),
    (
        "K that overflows",
        lambda: elbo(num_particles=2**63 - 1).loss(model, guide),
        RuntimeError,
        "do not fit in memory",
    ),
    ("recorded", lambda: elbo(num_particles=HUGE, compile=True).loss_and_grads(model, guide), RuntimeError, CHUNK),
    ("compiled steps", lambda: compiled(loss=elbo(num_particles=HUGE)).step(), RuntimeError, CHUNK),
    (
        "draws beyond memory",
        lambda: posterior().sample(10**14),
        RuntimeError,
        f"^{10**14} draws do not fit in memory at once; lower num_draws",
    ),
    ("drawn", lambda: posterior(num_particles=HUGE)(), RuntimeError, f"{HUGE} .*{CHUNK}"),
    ("evaluated with", lambda: evaluated(num_particles=HUGE), RuntimeError, f"{HUGE} .*{CHUNK}"),
    (
        "chunk beyond memory",
        lambda: elbo(num_particles=10 * HUGE, chunk_size=HUGE).loss(model, guide),
        RuntimeError,
        f"^{HUGE} particles do not fit in memory at once; pass a smaller chunk_size",
    ),
    (
        "plates beyond memory",
        lambda: elbo(plate_particles={"data": HUGE}).loss(model, guide),
        RuntimeError,
        r"each with those of \['data'\], .* below 3 \(without compile\), or lower plate_particles",
    ),
    (
        "combined beyond memory",
        lambda: elbo(plate_particles={"data": HUGE}, combine=True).loss(model, guide),
        RuntimeError,
        "lower num_particles or plate_particles",
    ),
    ("fewest", lambda: evaluated().worst(0), ValueError, "count >= 1, got 0"),
]
ROWS = [(*row, False) for row in NOT_CALLED] + [(*row, True) for row in CALLED]


@pytest.mark.parametrize("ask, kind, message, runs", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_what_is_said(ask, kind, message, runs):
    """Rows that run model and guide draw random numbers first; others leave the generator as it was."""
    with raises_cleanly(elbo(), kind, message):
        switches, generator = host_state(), get_rng_state()["torch"]
        try:
            ask()
        finally:
            assert host_state() == switches
            assert runs or torch.equal(get_rng_state()["torch"], generator)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()])
def test_backward_pass_beyond_memory(error):
    class Large(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise error

    def large_guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(Large.apply(pyro.param("phi", torch.zeros(3))), 1.0))

    with raises_cleanly(elbo(), type(error), "3 particles do not fit in memory at once; pass chunk_size= below 3"):
        elbo().loss_and_grads(model, large_guide)
    with raises_cleanly(elbo(), type(error), "^$" if isinstance(error, MemoryError) else "^CUDA out of memory"):
        elbo(num_particles=1).loss_and_grads(model, large_guide)  # there is nothing to make smaller


@pytest.mark.parametrize("text", ["the data base is down", "the queue ran out of memory cards"])
def test_other_errors_of_a_model_are_its_own(text):
    works = [True]

    def broken():
        model()
        if not works[0]:
            raise RuntimeError(text)

    loss = elbo()
    loss.loss(broken, guide)  # inspected
    works[0] = False
    with raises_cleanly(elbo(), RuntimeError, f"^{text}"):
        loss.loss(broken, guide)


def test_an_objective_is_asked_about_K_without_its_particles():
    """Which would not fit in memory, where chunks do."""
    for objective in (Renyi(0.5), MIWAE(2), PIWAE(2), CIWAE(0.5), TVO((0.0, 0.5))):
        assert elbo(num_particles=10**14, chunk_size=10, objective=objective).num_particles == 10**14


def test_a_chunk_may_be_larger_than_K():
    pyro.set_rng_seed(0)
    loss = elbo(chunk_size=100).loss(model, guide)
    assert math.isfinite(loss)


def inference_tensor():
    with torch.inference_mode():
        return torch.tensor([1.0, 2.0, 2.0])


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor([1, 2, 2]),
        torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 2.0], dtype=torch.float16),
        torch.tensor([1.0, 0.0, 2.0, 0.0, 2.0, 0.0])[::2],
        torch.stack([torch.tensor([1.0, 2.0, 2.0]), torch.zeros(3)], 1)[:, 0],
        inference_tensor(),
    ],
    ids=["whole numbers", "double", "half", "every other", "column", "made in inference mode"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient": StickTheLanding()},
        {"gradient": DoublyReparameterized()},
        {"gradient": DoublyReparameterized(), "chunk_size": 2},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "pathwise",
)
def test_data_of_all_kinds(data, options):
    """Mixed dtypes, gaps between entries: the loss and gradient of plain ones."""
    found = []
    for rows in (torch.tensor([1.0, 2.0, 2.0]), data):
        pyro.clear_param_store()
        loss = elbo(**options)
        loss.loss(model, guide, rows)
        pyro.set_rng_seed(1)
        found.append([loss.loss_and_grads(model, guide, rows), *[p.grad.item() for p in unconstrained()]])
    half = data.dtype == torch.float16  # so are the model's numbers then
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-2 if half else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": SampledBackward(draws=2)},
        {"gradient": DoublyReparameterized(), "plate_particles": {"data": 2}},
        {"gradient": DoublyReparameterized(), "compile": True},
    ],
    ids=["sampled", "plates", "compiled"],
)
@pytest.mark.usefixtures("recorded_only")
def test_latents_in_single_precision_and_data_in_another(options, dtype):
    def single_guide(x):
        guide(x.float())

    found = []
    for rows in (DATA, DATA.to(dtype)):
        pyro.clear_param_store()
        loss = elbo(**options)
        loss.loss(model, single_guide, rows)
        pyro.set_rng_seed(1)
        found.append([loss.loss_and_grads(model, single_guide, rows), *[p.grad.item() for p in unconstrained()]])
    if isinstance(loss.gradient, SampledBackward):  # other particles may be drawn
        found = [[loss] for loss, *_ in found]
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6 if dtype == torch.float64 else 5e-2)


def unconstrained():
    return [p for _, p in sorted(pyro.get_param_store().named_parameters())]


def test_expanded_data():
    found = []
    for rows in (torch.ones(3), torch.tensor(1.0).expand(3)):
        pyro.set_rng_seed(1)
        found.append(elbo().loss(model, guide, rows))
    assert found[0] == found[1]


def test_value_alone_in_inference_mode():
    pyro.set_rng_seed(1)
    expected = elbo().loss(model, guide)
    with torch.inference_mode():
        pyro.set_rng_seed(1)
        assert elbo().loss(model, guide) == expected
    elbo().loss_and_grads(model, guide)
