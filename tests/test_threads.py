"""One loaded model, vocabulary or page serves any number of threads, with the results of a single one."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from stair import SparseIndex, Stair, Vocabulary
from stair.clip import ClipConfig, DenseClip
from stair.encoders import attention_on
from stair.explain import explain
from stair.serve.app import application
from tests.support.models import tiny_config

LONG = " ".join(["a red ball on the green sea"] * 30)
TYPED = "red dogs runs -tree"


@pytest.fixture
def picture(pixels):
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def same_in_threads(calls, times=60, threads=12):
    """Every call gives in many threads at once, in any mixture, what it gives alone."""
    alone = [call() for call in calls]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [(n % len(calls), pool.submit(calls[n % len(calls)])) for n in range(times * len(calls))]
        for which, job in jobs:
            assert job.result() == alone[which]


def test_a_vocabulary_cuts_and_reads_texts_in_many_threads(vocab_file):
    vocabulary = Vocabulary(vocab_file)
    texts = [LONG] * 8
    same_in_threads(
        [
            lambda: len(vocabulary.token_ids(LONG)),
            lambda: vocabulary.tokenize(texts, 12)[0].tolist(),
            lambda: vocabulary.tokenize(texts, 30)[0].tolist(),
        ],
        times=150,
    )


def test_a_model_and_its_index_answer_many_threads(tiny_stair, picture, tmp_path):
    images = [picture, picture.rotate(90), picture.rotate(180)]
    index = SparseIndex.build(tmp_path / "i", tiny_stair.encode(images=images), ["a", "b", "c"], model=tiny_stair)
    same_in_threads(
        [
            lambda: tiny_stair.encode(texts=[LONG] * 4).toarray().tolist(),
            lambda: tiny_stair.encode_image(images).tolist(),
            lambda: [(hit.id, hit.score) for hit in index.search(words=TYPED, k=3)],
            lambda: [(hit.id, hit.score) for hit in index.search(LONG, k=3)],
            lambda: [[(hit.id, hit.score) for hit in hits] for hits in index.search_many([LONG, "a dog"], threads=2)],
            lambda: explain(tiny_stair, LONG, picture).score,
        ],
        times=20,
    )


def test_a_dense_model_answers_many_threads(vocab_file, picture):
    config = tiny_config(vocab_file)
    model = DenseClip(ClipConfig(config.vocabulary, config.image, config.text, 12)).eval()
    same_in_threads([lambda: model.encode_text([LONG]).tolist(), lambda: model.encode_image([picture]).tolist()], 20)


def test_loading_in_many_threads_gives_one_model(tiny_stair, tmp_path):
    tiny_stair.save_pretrained(tmp_path / "m")
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(Stair.from_pretrained, [tmp_path / "m"] * 4))
    assert {model.fingerprint for model in models} == {tiny_stair.fingerprint}


def test_the_search_page_answers_many_requests_at_once(tiny_stair, picture, tmp_path):
    index = SparseIndex.build(tmp_path / "i", tiny_stair.encode(images=[picture]), ["a"], model=tiny_stair)
    client = TestClient(application(index, tiny_stair, None, ["testserver"]))
    typed = {"words": {"red": 2, "dogs": 1, "runs": 1, "tree": -1}, "k": 1}

    def post(path, body):
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.content

    same_in_threads([lambda: post("/api/text", {"text": LONG}), lambda: post("/api/search", typed)], times=40)


def test_threads_in_half_precision_leave_torchs_switches_as_they_were(tiny_stair):
    def switches():
        backends = torch.backends.cuda
        return backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()

    def work(_):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(50):
                with attention_on(torch.device("cpu")):
                    assert switches() == (False, False, True)

    before = switches()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert switches() == before


def test_a_tokenizer_given_to_others_does_not_change_how_a_model_cuts(tiny_stair):
    pytest.importorskip("sentence_transformers")
    from stair.export.st_module import StairModule

    alone = tiny_stair.encode_text([LONG])
    StairModule(tiny_stair).tokenizer([LONG], truncation=True, max_length=4)
    assert torch.equal(tiny_stair.encode_text([LONG]), alone)


def test_importing_and_using_the_package_changes_no_setting_of_the_process(tiny_stair, picture, tmp_path):
    tiny_stair.save_pretrained(tmp_path / "m")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    # imported first are libraries: what they change is not ours
    code = f"""
import csv, importlib, importlib.util, os, pkgutil, random, signal, warnings
import lightning, matplotlib, numpy, PIL.Image, PIL.ImageFile, pyarrow, sklearn, timm, torch, transformers, uvicorn

for library in ("sentence_transformers", "open_clip"):
    if importlib.util.find_spec(library):
        importlib.import_module(library)

def state():
    return dict(
        filters=list(warnings.filters), csv=csv.field_size_limit(), environment=dict(os.environ), folder=os.getcwd(),
        pillow=(PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES), threads=torch.get_num_threads(),
        random=(random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        grad=torch.is_grad_enabled(), dtype=torch.get_default_dtype(), signal=signal.getsignal(signal.SIGTERM),
        deterministic=torch.are_deterministic_algorithms_enabled(), tf32=torch.get_float32_matmul_precision(),
    )

before = state()
import stair
model = stair.Stair.from_pretrained({str(tmp_path / "m")!r})
before["random"] = state()["random"]  # building a model draws random numbers
for module in pkgutil.walk_packages(stair.__path__, "stair."):
    try:
        importlib.import_module(module.name)
    except ImportError:
        pass
model.encode(images=[{str(tmp_path / "a.png")!r}])
model.encode(texts=["a red dog"])
after = state()
print([name for name in before if before[name] != after[name]])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]"), done.stdout
