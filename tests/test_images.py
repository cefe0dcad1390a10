"""Image classifiers through all stages: a tiny ViT and DeiT, from image folders to a report."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fmn.errors import UserError
from fmn.evaluate.files import read_metrics
from fmn.merge.recipe import read_recipe
from fmn.merge.stages import (
    CalibrateSettings,
    MergeSettings,
    RealignSettings,
    calibrate,
    merge,
    realign,
)
from fmn.models.loading import load_model, load_processor
from fmn.models.predict import predict
from fmn.report.stages import report
from fmn.sources.stages import fetch
from fmn.tasks.dataset import read_split
from fmn.tasks.encoding import encode
from fmn.tasks.task import load_task
from tests.pipeline import CPU, METHODS, make_expert, merge_inputs, prepare, score

CLASSES = {"colour": ("blue", "green", "red"), "side": ("left", "right")}
MODELS = {
    "vit": (transformers.ViTConfig, transformers.ViTModel),
    "deit": (transformers.DeiTConfig, transformers.DeiTModel),
}


def picture(task: str, name: str, rng: np.random.Generator) -> Image.Image:
    """A noisy image of a colour, or with a bright half, in one of several sizes."""
    size = int(rng.integers(8, 14))
    pixels = rng.integers(0, 120, (size, size + 2, 3))
    if task == "colour":
        pixels[..., ("red", "green", "blue").index(name)] += 120
    else:
        half = slice(0, size // 2) if name == "left" else slice(size // 2 + 2, None)
        pixels[:, half] += 130
    return Image.fromarray(pixels.astype(np.uint8))


def bytes_of(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def write_folders(folder: Path, task: str, count: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for name in CLASSES[task]:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            kind = ("png", "jpeg", "webp", "bmp", "tiff", "gif")[number % 6]
            image = picture(task, name, rng)
            (folder / name / f"{number}.{kind}").write_bytes(bytes_of(image, kind))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, experts and statistics; not to be changed by a test."""
    work = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config, model = MODELS[request.param]
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    image = {"image_size": 8, "patch_size": 4}
    model(config(num_hidden_layers=2, **sizes, **image)).save_pretrained(work / "source")
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(work / "source")
    fetch(str(work / "source"), out=work / "base")
    for task in CLASSES:
        folder = write_folders(work / "images" / task, task)
        options = {"kind": "image-classification", "validation_size": 12}
        prepare(task, work, dataset=str(folder), **options)
        tuning = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 16}
        make_expert(work, task, work / "base", estimator="expected", **tuning)
    return work


def inputs(work: Path) -> dict[str, Any]:
    return merge_inputs(work, CLASSES, work / "base")


def answers(folder: Path, contents: list[bytes]) -> np.ndarray:
    """What a checkpoint answers, without a line of ours."""
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    with torch.no_grad():
        logits: np.ndarray = model.eval()(**processor(images, return_tensors="pt")).logits.numpy()
    return logits


def test_an_expert_answers_as_with_transformers_alone_and_has_learnt_something(work: Path) -> None:
    for task, expert in inputs(work)["experts"].items():
        definition = load_task(work / "data", task)
        assert definition.labels == CLASSES[task]
        table = read_split(work / "data", definition, "validation")
        examples = encode(load_processor(expert), definition, table)
        assert examples.lengths.tolist() == [5] * 12  # so many tokens bound a batch
        own = predict(load_model(expert), examples, **CPU)
        wanted = answers(expert, table["image"].to_pylist())
        np.testing.assert_allclose(own, wanted, atol=1e-5)
        out = score(expert, work, task, [task])
        accuracy = (wanted.argmax(1) == np.array(table["label"])).mean()
        assert read_metrics(out).tasks[task].score == pytest.approx(accuracy)
        assert accuracy > 0.8


@pytest.mark.parametrize("work", ["vit"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_models_for_transformers(work: Path, method: str) -> None:
    out = work / method
    merge(**inputs(work), out=out, settings=MergeSettings(method=method))
    content = bytes_of(picture("side", "left", np.random.default_rng(0)))
    encoder, info = transformers.AutoModel.from_pretrained(
        out / "encoder", output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"pooler"}
    for task in CLASSES:
        answers(out / "tasks" / task, [content])
        model = load_model(out / "tasks" / task)
        for name, tensor in model.base_model.state_dict().items():
            assert torch.equal(tensor, encoder.state_dict()[name])
    if method == "average":  # put together by hand
        states = [load_model(e).base_model.state_dict() for e in inputs(work)["experts"].values()]
        for name, tensor in load_model(out / "tasks/side").base_model.state_dict().items():
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_a_merge_is_chosen_calibrated_realigned_scored_and_reported(work: Path) -> None:
    rows, experts = work / "data", inputs(work)["experts"]
    auto, calibrated, out = work / "auto", work / "calibrated", work / "realigned"
    merge(**inputs(work), out=auto, data=rows, settings=MergeSettings(method="auto", **CPU))
    settings = CalibrateSettings(texts=48, **CPU)
    calibrate(auto, experts=experts, data=rows, out=calibrated, settings=settings)
    refit = RealignSettings(texts=48, **CPU)
    realign(calibrated, experts=experts, data=rows, out=out, settings=refit)
    recipe = read_recipe(out)
    assert recipe.realign is not None
    assert all(fit.after and fit.after < fit.before for fit in recipe.realign.tasks.values())
    scores = {"merged": score(out, work, "merged")}
    of_experts = {task: score(experts[task], work, task, [task]) for task in CLASSES}
    written = report(
        merged=scores, models={"merged": out}, experts=of_experts, fisher=inputs(work)["fisher"],
        out=work / "report",
    )  # fmt: skip
    assert written.computed
    for task in CLASSES:
        table = read_split(rows, load_task(rows, task), "validation")
        logits = answers(out / "tasks" / task, table["image"].to_pylist())
        accuracy = (logits.argmax(1) == np.array(table["label"])).mean()
        assert read_metrics(scores["merged"]).tasks[task].score == pytest.approx(accuracy)


@pytest.mark.parametrize("work", ["vit"], indirect=True)
def test_a_processor_that_makes_other_images_is_refused(work: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((work / "experts/side" / name).read_bytes())
    with pytest.raises(UserError, match=r"preprocessor_config.json cannot be used"):
        load_processor(tmp_path)
    size = {"height": 6, "width": 8}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"makes images of \[3, 6, 8\], but the model reads"):
        load_processor(tmp_path)
    size = {"height": 10**6, "width": 10**6}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"size.height = 1000000 pixels are beyond all reason"):
        load_processor(tmp_path)
