"""`triptych evaluate`: fixed prompts, fixed seeds, pictures judged automatically, measures with intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from triptych.errors import RequestError, nearest

if TYPE_CHECKING:
    from triptych.evaluation.evaluate import Report
    from triptych.pipelines.cascade import Cascade

HELP = """Measure a model, or the distance between two sets of pictures.

Examples:

  triptych evaluate shapes

  triptych evaluate icons --model mini --seeds 5 --all --out report

  triptych evaluate reconstruction --data val.tar

  triptych evaluate image_encoder --data val.tar

  triptych evaluate binding --stage-c runs/mini/stage_c/stage_c.safetensors

  triptych evaluate variations --data val.tar --count 40 --seeds 2

  triptych evaluate distances --data real --pictures made --features inception --weights judges

  triptych evaluate distances --data real --pictures made --features dinov2 --download

  triptych evaluate scores --prompts parti --count 100 --judges clipscore,hps --weights judges

  triptych evaluate scores --pictures runs/made --judges aesthetic --weights judges

shapes: are the asked-for coloured shapes there, in their relation? One object, pairs, and pairs of colour and
shape that no training picture has. icons: does a classifier name the prompt's concept first among a hundred?
words: the same, asked for without their names ("the organ we think with"). looks: do twenty things come as
line art, a silhouette, in black and white, in other colours when asked to? binding: how much worse does Stage
C denoise pairs when forms or colours of their captions are exchanged? Nothing is drawn for that: it tells
within a minute whether a run learns which word belongs where. reconstruction: how pictures survive Stage A,
and the semantic encoder with Stages B and A. image_encoder: is a picture's own name the nearest of a hundred
to its embedding? Nothing is drawn for that. variations: is the concept of an icon still seen in its
variations? img2img: how much of a picture is left at each strength? canny, inpainting, super_resolution,
pixel_super_resolution: how well pictures follow their ControlNet. structured: one skill at a time, as GenEval
asks: counting, colours, position, binding. scores: any prompts, or pictures that hold theirs, judged by
published networks: clipscore, pickscore, hps, imagereward, aesthetic, and detector for the things of
--prompts objects. Their files are yours, in WEIGHTS/NAME; a judge that is missing says how to get it. lpips
and dists are for reconstruction. distances: Frechet (FID, FD), kernel (KID), CMMD, precision and recall of a
folder against another; the network comes with the package (mobilenet), is yours in WEIGHTS/inception (FID and
KID as published), or is downloaded with --download (clip, dinov2).
"""

CONTROLS = ("canny", "inpainting", "super_resolution", "pixel_super_resolution")
PICTURES = ("reconstruction", "image_encoder", "variations", "img2img", *CONTROLS)
KINDS = ("shapes", "structured", "icons", "words", "looks", "binding", "scores", *PICTURES, "distances")
DEFAULT_PICTURES = dict.fromkeys(PICTURES, 100) | {"variations": 40, "img2img": 20}
# Measures that are no shares.
PLAIN = ("psnr", "ssim", "distance", "lpips", "dists", "score", "hps", "imagereward", "aesthetic")


def evaluate(
    what: Annotated[
        str,
        Argument(help="shapes, structured, icons, scores, reconstruction, distances, ...: see above."),
    ],
    model: Annotated[str, Option(help="mini, cascade, cascade-lite, a hub name or a folder.")] = "mini",
    stage_c: Annotated[str | None, Option(help="Another Stage C: 3.6b, 1b or a file.")] = None,
    stage_b: Annotated[str | None, Option(help="Another Stage B: 1.5b, 700m or a file.")] = None,
    stage_a: Annotated[str | None, Option(help="Another Stage A: a file.")] = None,
    seeds: Annotated[int, Option(min=1, help="Pictures per prompt, with seeds 0, 1, ...")] = 1,
    everything: Annotated[
        bool, Option("--all", help="All validation prompts in place of the 100 fixed ones per set.")
    ] = False,
    data: Annotated[
        Path | None, Option(help="Pictures to work on: a tar shard or folder. [drawn shapes]")
    ] = None,
    count: Annotated[
        int | None, Option(min=1, help="Use only the first so many prompts or pictures.")
    ] = None,
    size: Annotated[str | None, Option(help="Width x height in pixels, such as 256x256.")] = None,
    steps: Annotated[int | None, Option(help="Steps of Stage C.")] = None,
    guidance: Annotated[float | None, Option(help="Guidance of Stage C; 1 is off.")] = None,
    decoder_steps: Annotated[int | None, Option(help="Steps of Stage B.")] = None,
    decoder_guidance: Annotated[float | None, Option(help="Guidance of Stage B; 1 is off.")] = None,
    sampler: Annotated[str | None, Option(help="ddpm, ddim, euler, dpmpp_2m or lcm, for Stage C.")] = None,
    device: Annotated[str, Option(help="auto, cuda, cuda:1, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    batch: Annotated[int | None, Option(help="Pictures that share a network call. [up to 4]")] = None,
    pictures: Annotated[
        Path | None,
        Option(help="For scores and distances: the folder to be judged; for distances also a .npy file."),
    ] = None,
    features: Annotated[
        str,
        Option(help="For distances: mobilenet, inception, clip, dinov2 or a folder; the first of a list."),
    ] = "mobilenet",
    download: Annotated[
        bool, Option("--download", help="For distances: fetch the network if it is not here.")
    ] = False,
    prompts: Annotated[
        str, Option(help="For scores: parti, aesthetic, objects, structured, ... or a file.")
    ] = "parti",
    judges: Annotated[
        str, Option(help="For scores: clipscore, hps, ..., detector; for reconstruction: lpips, dists.")
    ] = "",
    weights: Annotated[
        Path | None, Option(help="Folder with a folder of weights for every judge, or for inception.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder for picture grids, one JSON file and one of rows per set.")
    ] = None,
    json_output: Annotated[bool, Option("--json", help="Print JSON alone.")] = False,
) -> None:
    if what not in KINDS:
        raise RequestError(f'There is nothing to evaluate called "{what}": {nearest(what, KINDS)}.')
    if what == "distances":
        return distances(data, pictures, features, download, weights, count, json_output)
    if pictures is not None and what != "scores":
        raise RequestError(f"--pictures is for scores and distances only; {what} makes its own.")
    if judges and what not in ("scores", "reconstruction"):
        raise RequestError(f"--judges is for scores and reconstruction only; {what} has a judge of its own.")
    names = [name.strip() for name in judges.split(",") if name.strip()]
    if pictures is not None:
        return tell([judged_pictures(pictures, names, weights, count)], out, json_output)
    if data is not None and what not in DEFAULT_PICTURES:
        raise RequestError(
            f"--data is for {', '.join(DEFAULT_PICTURES)} only; {what} has prompts of its own."
        )
    if data is None and what == "variations":
        raise RequestError("Variations are measured on icons: name a tar shard of them with --data.")
    from triptych.pipelines.cascade import Cascade

    sampling = {
        "size": size,
        "steps": steps,
        "guidance": guidance,
        "decoder_steps": decoder_steps,
        "decoder_guidance": decoder_guidance,
        "sampler": sampler,
        "batch": batch,
    }
    settings = {name: value for name, value in sampling.items() if value is not None}
    cascade = Cascade.load(
        model, stage_c=stage_c, stage_b=stage_b, stage_a=stage_a, device=device, dtype=dtype
    )
    if what == "scores":
        reports = judged_prompts(cascade, prompts, names, weights, range(seeds), count, settings)
    else:
        settings |= reconstruction_judges(names, weights)
        reports = measured(what, cascade, range(seeds), everything, data, count, settings)
    return tell(reports, out, json_output)


def tell(reports: Iterable[Report], out: Path | None, json_output: bool) -> None:
    """Print and store each report as soon as it is there."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    seen = []
    for report in reports:
        seen.append(report)
        if out is not None:
            save(report, out)
        if not json_output:
            show(report)
    if json_output:
        typer.echo(json.dumps([report.as_json() for report in seen], ensure_ascii=False, indent=2))


def judged_prompts(
    cascade: Cascade,
    source: str,
    names: list[str],
    weights: Path | None,
    seeds: range,
    count: int | None,
    settings: dict[str, Any],
) -> Iterator[Report]:
    """The report of any prompts, judged by networks and by what the prompts say."""
    from triptych.evaluation.prompted import evaluate_prompts
    from triptych.evaluation.prompts import study_prompts
    from triptych.evaluation.scorers import open_scorers

    detector = None
    if "detector" in names:
        from triptych.evaluation.detector import open_detector

        detector = open_detector(weights)
    scorers = open_scorers([name for name in names if name != "detector"], weights)
    asked = study_prompts(source, count)
    with pictures_progress("scores") as progress:
        report = evaluate_prompts(cascade, asked, seeds, progress, scorers, detector, **settings)
    yield report


def judged_pictures(folder: Path, names: list[str], weights: Path | None, count: int | None) -> Report:
    """The report of pictures that are there."""
    from triptych.evaluation.prompted import evaluate_pictures
    from triptych.evaluation.scorers import open_scorers

    scorers = open_scorers(names, weights)
    with pictures_progress("scores") as progress:
        return evaluate_pictures(folder, scorers, count, progress)


def reconstruction_judges(names: list[str], weights: Path | None) -> dict[str, Any]:
    """LPIPS and DISTS, opened before anything is reconstructed."""
    if not names:
        return {}
    from triptych.evaluation.perceptual import open_distances

    return {"distances": open_distances(names, weights)}


def measured(
    what: str,
    cascade: Cascade,
    seeds: range,
    everything: bool,
    data: Path | None,
    count: int | None,
    settings: dict[str, Any],
) -> Iterator[Report]:
    """The reports of one kind, each as soon as it is there."""
    from triptych.evaluation import editing
    from triptych.evaluation import evaluate as evaluation
    from triptych.evaluation.prompts import (
        described_prompts,
        icon_prompts,
        shapes_prompts,
        structured_shapes,
    )

    if what in ("shapes", "structured"):
        sets = shapes_prompts(everything) if what == "shapes" else structured_shapes()
        for name, shapes in sets.items():
            with pictures_progress(name) as progress:
                report = evaluation.evaluate_shapes(
                    cascade, shapes[:count], seeds, progress, name, **settings
                )
            yield report
    elif what == "icons":
        with pictures_progress("icons") as progress:
            report = evaluation.evaluate_icons(
                cascade, icon_prompts(everything)[:count], seeds, progress, **settings
            )
        yield report
    elif what == "words":
        with pictures_progress(what) as progress:
            yield evaluation.evaluate_icons(
                cascade, described_prompts()[:count], seeds, progress, name=what, **settings
            )
    elif what == "looks":
        from triptych.evaluation.looks import evaluate_looks

        with pictures_progress(what) as progress:
            yield evaluate_looks(cascade, seeds, count, progress, **settings)
    elif what == "binding":
        from triptych.evaluation.binding import evaluate_binding

        draws_nothing(what, settings)
        with pictures_progress(what) as progress:
            yield evaluate_binding(cascade, count or 100, progress)
    else:
        from triptych.data.shards import ShardIndex
        from triptych.data.sources import DrawnShapes

        number = count or DEFAULT_PICTURES[what]
        source = DrawnShapes(number) if data is None else ShardIndex(data)
        number = len(source) if everything and count is None else number
        with pictures_progress(what) as progress:
            if what == "image_encoder":
                yield naming(cascade, source, number, settings)
            elif what == "reconstruction":
                settings.pop("size", None)  # every picture keeps its own
                yield evaluation.evaluate_reconstruction(cascade, source, number, 0, progress, **settings)
            elif what in CONTROLS:
                yield obedience(what, cascade, source, number, progress, settings)
            elif isinstance(source, ShardIndex) and what == "variations":
                yield editing.evaluate_variations(cascade, source, number, seeds, progress, **settings)
            else:
                yield editing.evaluate_img2img(cascade, source, number, 0, progress, **settings)


def draws_nothing(what: str, settings: dict[str, Any]) -> None:
    """Refuse settings of sampling where nothing is sampled."""
    if settings:
        raise RequestError(f"{what} draws nothing: leave {', '.join(settings)} out.")


def naming(cascade: Cascade, source: Any, count: int, settings: dict[str, Any]) -> Report:
    """How often a picture's own name is the nearest."""
    from triptych.evaluation.naming import evaluate_image_encoder

    draws_nothing("image_encoder", settings)
    return evaluate_image_encoder(cascade, source, count)


def obedience(
    what: str, cascade: Cascade, source: Any, count: int, progress: Any, settings: dict[str, Any]
) -> Report:
    """How well pictures follow the ControlNet of one kind."""
    from triptych.evaluation import control

    if what == "canny":
        return control.evaluate_canny(cascade, source, count, 0, progress, **settings)
    if what == "inpainting":
        return control.evaluate_inpainting(cascade, source, count, 0, progress, **settings)
    return control.evaluate_super_resolution(cascade, source, count, 0, progress, kind=what, **settings)


def distances(
    data: Path | None,
    pictures: Path | None,
    features: str,
    download: bool,
    weights: Path | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Print every distance between two sets of pictures."""
    if data is None or pictures is None:
        raise RequestError("Distances need two sets: real pictures (--data) and made ones (--pictures).")
    from triptych.evaluation.features import KNOWN_AS, compare_sets, open_features

    found = compare_sets(data, pictures, open_features(features, download, weights), count)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        known = KNOWN_AS.get((str(found["features"]), name))
        told = f"{value:.4f}" if isinstance(value, float) else value
        typer.echo(f"  {f'{name} ({known})' if known else name:20s} {told}")


@contextmanager
def pictures_progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A function to tell how many pictures are done; a bar on a terminal, a line at every tenth elsewhere."""
    if not sys.stderr.isatty():

        def say(done: int, total: int) -> None:
            if done == total or done % max(1, total // 10) == 0:
                print(f"{name}: {done} of {total} pictures", file=sys.stderr)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, total=total, completed=done)


def show(report: Report) -> None:
    """A small table: one measure a line, with its 95 % interval."""
    typer.echo(f"{report.name} ({len(report.rows)} pictures)")
    for name, estimate in report.measures.items():
        values = (estimate.value, estimate.low, estimate.high)
        if not any(word in name for word in PLAIN):
            value, low, high = (f"{100 * v:5.1f} %" for v in values)
        else:
            value, low, high = (f"{v:8.3f}" for v in values)
        typer.echo(f"  {name:40s} {value}   {low} to {high}   of {estimate.count}")
    for name, number in report.numbers.items():
        typer.echo(f"  {name:40s} {number:8.3f}")


def save(report: Report, out: Path) -> None:
    """NAME.json with everything, NAME.jsonl (and NAME.parquet) with a row a picture, NAME.png with all
    pictures (for reconstruction, three columns a picture)."""
    from triptych.evaluation.tables import write_rows
    from triptych.images import grid

    text = json.dumps(report.as_json(), ensure_ascii=False, indent=2)
    (out / f"{report.name}.json").write_text(text + "\n", encoding="utf-8")
    write_rows(report.rows, out / report.name)
    if not report.images:
        return
    columns = 12 if report.name == "reconstruction" else report.columns
    sizes = {image.size for image in report.images}
    images = [image.resize(min(sizes)) for image in report.images] if len(sizes) > 1 else report.images
    grid(images, columns, gap=4).save(out / f"{report.name}.png")
