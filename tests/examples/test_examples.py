"""The examples, each run as a user would: a process of its own, in a folder of its own."""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from onnx_lathe.runtime.bundle import open_bundle, write_bundle
from onnx_lathe.runtime.session import Session
from tests import graphs

EXAMPLES = Path(__file__).parents[2] / "examples"
HEADERS = tuple(
    Path(folder)
    for folder in (os.environ.get("ONNXRUNTIME_HEADERS"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime")
    if folder
)


def run(folder: Path, *arguments: object) -> str:
    """Run Python in ``folder`` and return what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    model = graphs.save(graphs.build(graphs.CLASSIFIER), tmp_path / "classifier.onnx")
    return write_bundle(tmp_path / "bundle", {"model.onnx": model}, {}, {"provider": "cpu", "threads": 1})


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 16, 8, 8)).astype(np.float32)


QUICK = """
max_drop = 1.0
threads = 1
candidates = ["cleanup,quantize-static"]
"""


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "own_cnn.py", tmp_path)
    recipe = (EXAMPLES / "own_cnn.toml").read_text()
    quick = re.sub(r"time_budget = \d+", "time_budget = 1", re.sub(r"epochs = \d+", "epochs = 2", recipe))
    assert quick != recipe
    (tmp_path / "own_cnn.toml").write_text(quick.replace("max_drop = 0.03", QUICK))
    run(tmp_path, "-m", "onnx_lathe.converter", "convert", "own_cnn.toml", "-o", "out")
    found = Session(tmp_path / "out").run({"image": np.zeros((2, 1, 16, 16), np.float32)})
    assert found["logits"].shape == (2, 4)


ENCODER = """
import sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

folder, *words = sys.argv[1:]
vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *words))}
tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
"""
"""Writes a small encoder of random weights and a tokenizer of whole words, as `save_pretrained` does."""


def test_an_encoder_of_transformers(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(30)]
    run(tmp_path, "-c", ENCODER, "encoder", *words)
    generator = random.Random(0)
    lines = (" ".join(generator.choices(words, k=generator.randint(3, 12))) for _ in range(60))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    printed = run(tmp_path, EXAMPLES / "transformers_encoder.py", "encoder", "text.txt", "out", 1)
    cosine = re.search(r"cosine with torch: ([\d.]+) at worst, of 8 sentences", printed)
    assert cosine
    assert float(cosine[1]) > 0.95
    assert open_bundle(tmp_path / "out" / "bundle").provider == "cpu"


def test_plain_onnxruntime_in_python(tmp_path: Path, bundle: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", image=images)
    printed = run(tmp_path, EXAMPLES / "plain_onnxruntime.py", bundle, "x.npz", "y.npz")
    assert printed == "logits: float32 [3, 5]\n"
    np.testing.assert_array_equal(
        np.load(tmp_path / "y.npz")["logits"], Session(bundle).run({"image": images})["logits"]
    )


def test_plain_onnxruntime_in_cpp(tmp_path: Path, bundle: Path, images: np.ndarray) -> None:
    headers = next((folder for folder in HEADERS if (folder / "onnxruntime_cxx_api.h").is_file()), None)
    if headers is None:
        pytest.skip(f"no onnxruntime_cxx_api.h in {', '.join(map(str, HEADERS))}: install libonnxruntime-dev")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    library = tmp_path / "libonnxruntime.so.1"  # the name that the loader asks for; the wheel's file has a longer one
    library.symlink_to(next(Path(found.origin).parent.glob("capi/libonnxruntime.so.1.*")))
    program = tmp_path / "plain_onnxruntime"
    source = EXAMPLES / "plain_onnxruntime.cpp"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", headers]
    subprocess.run([compiler, *flags, source, library, f"-Wl,-rpath,{tmp_path}", "-o", program], check=True)

    done = subprocess.run([program, bundle], input=images.tobytes(), capture_output=True, check=True)
    printed = np.frombuffer(done.stdout, np.float32).reshape(3, 5)
    np.testing.assert_allclose(printed, Session(bundle).run({"image": images})["logits"], rtol=1e-5)

    for arguments, given, message in (
        ([bundle], images.tobytes()[:-4], "expected a multiple of 1024 float32 values on stdin"),
        ([tmp_path], images.tobytes(), "is no bundle: it has no session.toml"),
        ([], b"", "usage: plain_onnxruntime BUNDLE"),
    ):
        done = subprocess.run([program, *arguments], input=given, capture_output=True, check=False)
        assert done.returncode == 1
        assert message in done.stderr.decode()


def test_a_client_of_the_service(tmp_path: Path, bundle: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", image=images)
    command = [sys.executable, "-m", "onnx_lathe.converter", "serve", bundle, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        try:
            assert service.stderr is not None
            url = re.search(r"http://(\S+)", service.stderr.readline())
            assert url
            with triton.InferenceServerClient(url[1]) as client:
                end = time.monotonic() + 60
                while not client.is_server_ready():
                    assert time.monotonic() < end
                    time.sleep(0.1)
            printed = run(tmp_path, EXAMPLES / "service_client.py", url[1], "bundle", "x.npz", "y.npz")
        finally:
            service.kill()
    assert printed == "logits: float32 [3, 5]\n"
    np.testing.assert_array_equal(
        np.load(tmp_path / "y.npz")["logits"], Session(bundle).run({"image": images})["logits"]
    )
