"""Settings for every test."""

# ruff: noqa: E402

import gc
import os

# No test asks the hub, also in processes that tests start: without a network each question would be waited for. Read
# when huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft  # noqa: F401  (imported so that it is frozen below, as are the others)
import pytest
import torch
import transformers
from jaxtyping import install_import_hook

import support.shapes  # noqa: F401  (the hook below looks it up)

# Types and shapes of arguments, results and fields are checked at each call of what makes batches, scores and losses.
# Not of what torch's compiler traces (attention), nor of what tells users that an argument is wrong (`score`).
SHAPED = [f"tether.scoring.{name}" for name in ("batch", "divergence", "head", "reward", "router")]
install_import_hook(["tether.types", "tether.objectives", *SHAPED], "support.shapes.checked")

from tether.compute import cpu_matmul as products

# Tiny tensors gain nothing from threads and lose much to switching between them on a shared machine.
torch.set_num_threads(1)
# In processes that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# accelerate collects garbage in every training run, which walks through all that the libraries hold: most of the time
# of a run on a tiny model.
_ = transformers.Trainer, transformers.AutoModelForCausalLM
gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `sweep(N)`, N cases spread evenly over all stay in the ordinary suite; the others are slow."""
    sweeps: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sweep") and not item.get_closest_marker("slow"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in sweeps.values():
        kept = cases[0].get_closest_marker("sweep").args[0]
        step = (len(cases) - 1) / max(kept - 1, 1)
        chosen = {round(position * step) for position in range(kept)}
        for position, case in enumerate(cases):
            if position not in chosen:
                case.add_marker("slow")


def pytest_collection_finish() -> None:
    """Leave modules of tests and their thousands of items alone, too, see above."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what is in the home of who runs it; processes that a test starts inherit this."""
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path_factory.getbasetemp() / "tether-cache"))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every float32 product that may go to oneDNN goes there, however small; the list grows with each."""
    if not products.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "_setting", {"library": "onednn"})
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    made: list[int] = []
    plain = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", lambda *tensors: made.append(1) or plain(*tensors))
    return made
