"""Teaching a LoRA: every kind learns, only what is taught is kept, and generation sees what training saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_cascade import write_tiny_cascade

from triptych.apps.cli.main import run
from triptych.checkpoints.catalog import find_model
from triptych.checkpoints.files import read_tensors
from triptych.checkpoints.load import load_part
from triptych.checkpoints.lora import read_lora
from triptych.diffusion.loss import min_snr_weight
from triptych.errors import SettingsError
from triptych.images import read_metadata
from triptych.models.lora import merge
from triptych.training.config import RunSettings, read_settings, shipped_recipe
from triptych.training.loop import Progress, train
from triptych.training.lora import build_base, following, inject, worded
from triptych.training.prior import gated
from triptych.training.sources import Pictures
from triptych.training.state import under

pytest.importorskip("peft")
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny" / "lora.toml"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cascade(tmp_path_factory.mktemp("model"))


def settings(model: Path, out: Path, *changes: str) -> RunSettings:
    common = [f"out={out}", "tensorboard=false", f"lora.model={model}", "data.size=64", "log_every=1"]
    return read_settings(RECIPE, [*common, *changes])


def shapes(model: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    found = {}
    for part in ("stage_c", "stage_b"):
        network, _ = load_part(model / f"{part}.safetensors", part)
        found[part] = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return found


def losses(out: Path) -> list[float]:
    return [json.loads(line)["lora.loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "loha", "lokr"])
def test_what_a_run_writes_is_the_network_that_it_trained(kind: str, model: Path, tmp_path: Path) -> None:
    asked = settings(
        model, tmp_path, "steps=3", "save_every=3", "sample_every=100", f"lora.kind={kind}", "ema.start=100",
        "lora.prior=0.0", "lora.modules=['attn', 'embedding.1']", "optim.lr=0.1", "lora.alpha=3",
    )  # fmt: skip
    train(asked)
    lora = read_lora(tmp_path / "tiny.safetensors", shapes(model))
    files = find_model(str(model))
    base = build_base(following(asked, files), files, torch.device("cpu"))
    state = under(read_tensors(tmp_path / "state.safetensors"), "network.lora.")
    live = [p for p in base.networks["stage_c"].parameters() if p.requires_grad]
    with torch.no_grad():
        for index, parameter in enumerate(live):
            parameter.copy_(state[f"values.{index}"])
    plain, _ = load_part(model / "stage_c.safetensors", "stage_c", dtype=torch.float32)
    given = (torch.randn(2, 16, 2, 2), torch.tensor([0.3, 0.8]), torch.randn(2, 8, 384), torch.randn(2, 384))
    with torch.no_grad():
        before = plain(*given)
        merge(plain, [(change, 1.0) for change in lora.changes["stage_c"]])
        after, trained = plain(*given), base.networks["stage_c"](*given)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, trained, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lora.tokens["[tiny]"], state[f"values.{len(live)}"])
    assert lora.info.licence == "CC0-1.0"


def test_stages_c_and_b_learn_together_and_a_stopped_run_continues_bit_for_bit(
    model: Path, tmp_path: Path
) -> None:
    changes = ("steps=4", "save_every=2", "sample_every=4", "lora.parts=['stage_c', 'stage_b']")

    def stop(progress: Progress) -> None:
        if progress.what == "train" and progress.step == 3:
            raise InterruptedError

    train(settings(model, tmp_path / "whole", *changes))
    with pytest.raises(InterruptedError):
        train(settings(model, tmp_path / "broken", *changes), stop)
    train(settings(model, tmp_path / "broken", *changes))
    for file in ("state.safetensors", "tiny.safetensors"):
        whole, broken = (read_tensors(tmp_path / name / file) for name in ("whole", "broken"))
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert set(read_lora(tmp_path / "whole" / "tiny.safetensors", shapes(model)).changes) == {
        "stage_c",
        "stage_b",
    }
    assert (tmp_path / "whole" / "samples" / "0000004.png").exists()


@pytest.mark.parametrize("repeat", [1, 3])
def test_training_from_a_cache_gives_the_same_losses(repeat: int, model: Path, tmp_path: Path) -> None:
    changes = ("steps=3", "save_every=3", "sample_every=100", "data.random_crop=false", "lora.prior=0.0",
               "lora.parts=['stage_c', 'stage_b']", f"data.repeat={repeat}")  # fmt: skip
    train(settings(model, tmp_path / "live", *changes))
    train(settings(model, tmp_path / "cached", *changes, f"data.cache={tmp_path}/cache"))
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "cached"), rel=2e-3)


def test_captions_carry_the_token(model: Path, tmp_path: Path) -> None:
    asked = Pictures(settings(model, tmp_path))
    templates = asked.settings.lora.templates
    assert worded(asked, (), 0, 0) in [template.format(token="[tiny]") for template in templates]
    assert worded(asked, ("a dog",), 0, 0) == "[tiny], a dog"
    assert worded(asked, ("my [tiny] dog",), 0, 0) == "my [tiny] dog"
    plain = Pictures(settings(model, tmp_path, "lora.token=false"))
    assert worded(plain, ("a dog",), 0, 0) == "a dog"


def test_min_snr_is_the_clipped_weight_of_x0() -> None:
    logsnr = torch.tensor([-3.0, 0.0, 4.0])
    snr = logsnr.exp()
    torch.testing.assert_close(min_snr_weight(logsnr, "eps"), torch.minimum(snr, torch.tensor(5.0)) / snr)
    torch.testing.assert_close(min_snr_weight(logsnr, "v") * (snr + 1), min_snr_weight(logsnr, "x0"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lora.modules=['nothing']", "no matrix of stage_c"),
        ("lora.kind=locon", "lora.kind"),
        ("lora.word=''", "starts from a word"),
        ("name=''", "needs a name"),
    ],
)
def test_wrong_settings_are_one_sentence(change: str, said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said):
        train(settings(model, tmp_path, change))


def test_the_shipped_recipe_knows_its_token() -> None:
    assert read_settings(shipped_recipe("lora"), ["name=mydog"]).sample_prompts[0] == "a picture of [mydog]"
    with pytest.raises(SettingsError, match=r"Known: .*lora"):
        shipped_recipe("none")


def test_the_short_form_of_the_command_leaves_a_file_that_generation_wears(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = RECIPE.with_name("fixture-64.tar")
    changes = ["steps=1", "data.size=64", "data.cache=", "optim.schedule=constant"]
    flags = [part for change in changes for part in ("--set", change)]
    command = ["train", "--recipe", "lora", "--data", str(data), "--name", "dog", "--model", str(model)]
    assert run([*command, *flags]) == 0
    told = capsys.readouterr().out
    assert 'Try: triptych generate "a picture of [dog]" --lora dog.safetensors' in told
    assert "Other prompts moved by 0.000." in told
    report = (tmp_path / "runs" / "dog" / "report.html").read_text()
    assert "What was taught" in report
    assert "with the token" in report
    generate = ["generate", "a [dog]", "--lora", "dog.safetensors:0.5", "--model", str(model), "--seed", "1"]
    assert run(generate) == 0
    (picture,) = tmp_path.glob("*.png")
    assert read_metadata(picture)["request"]["lora"] == ["dog.safetensors:0.5"]
    assert run(["generate", "--like", str(picture), "--out", "again"]) == 0
    again = next((tmp_path / "again").glob("*.png"))
    assert again.read_bytes() == picture.read_bytes()
    assert run(["train", "--recipe", "lora", "--data", str(data)]) == 2
    assert "--name" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_peft_holds_several_adapters_on_one_network_at_once(model: Path) -> None:
    """Attention's packed matrix is a plain linear layer, so nothing about a Stage C is special to peft."""
    import peft

    network, _ = load_part(model / "stage_c.safetensors", "stage_c", dtype=torch.float32)
    plain, _ = load_part(model / "stage_c.safetensors", "stage_c", dtype=torch.float32)
    target = "down_blocks.0.2.attention.attn.in_proj"
    for name, rank in (("first", 2), ("second", 3)):
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=[target])
        peft.inject_adapter_in_model(config, network, adapter_name=name)
    layer = network.get_submodule(target)
    layer.set_adapter(["first", "second"])  # type: ignore[operator]
    added = torch.zeros_like(plain.get_parameter(f"{target}.weight"))
    for name in ("first", "second"):
        torch.nn.init.normal_(layer.lora_B[name].weight, std=0.1)  # type: ignore[index, union-attr]
        added += layer.lora_B[name].weight @ layer.lora_A[name].weight  # type: ignore[index, union-attr]
    given = (torch.randn(2, 16, 2, 2), torch.tensor([0.3, 0.8]), torch.randn(2, 8, 384), torch.randn(2, 384))
    with torch.no_grad():
        before = plain(*given)
        plain.get_parameter(f"{target}.weight").add_(added)
        torch.testing.assert_close(network(*given), plain(*given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, plain(*given))


def test_a_gated_run_shows_other_prompts_as_the_base_draws_them(model: Path) -> None:
    network, _ = load_part(model / "stage_c.safetensors", "stage_c", dtype=torch.float32)
    plain, _ = load_part(model / "stage_c.safetensors", "stage_c", dtype=torch.float32)
    own = read_settings(RECIPE, ["lora.modules=['attn']"]).lora
    inject(network, own, "stage_c")
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    given = (torch.randn(4, 16, 2, 2), torch.rand(4), torch.randn(4, 8, 384), torch.randn(4, 384))
    with torch.no_grad():
        made, base, on = gated(network, [True, False])(*given), plain(*given), network(*given)
    torch.testing.assert_close(made[1::2], base[1::2])
    torch.testing.assert_close(made[::2], on[::2])
    assert not torch.allclose(made[::2], base[::2], atol=1e-3)
