"""A recipe and its run: what a client's gradient betrays of its images, in a folder.

The attack sees the network and the evidence. The client's own images and labels are a `Secret`
that scoring alone reads; `labels: known` is the one way to hand their classes to the attacker.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jinv import checks, data, image, parallel
from jinv.attacks import gradient_inversion
from jinv.attacks.gradient_inversion import PRESETS, Candidates
from jinv.data import Split
from jinv.federated import defences, evidence, labels, registration
from jinv.federated.defences import Defence
from jinv.federated.evidence import Evidence, Local, Secret
from jinv.files import write_atomic
from jinv.models.network import Network
from jinv.recipes.invert import VERSIONS
from jinv.reports import curves, page
from jinv.runs import config as configs
from jinv.runs import hardware, run_folder
from jinv.scores import judging, lpips, similarity

ABLATION = "bn_only"
"""Folder of the run without the gradient."""

HIGHER, LOWER = "higher is nearer", "lower is nearer"
SCORES = {
    "psnr": ("PSNR [dB]", HIGHER),
    "ssim": ("SSIM", HIGHER),
    "lpips": ("LPIPS", LOWER),
    "fft_2d": ("FFT 2D", LOWER),
    "iip": ("IIP", HIGHER),
}


@dataclasses.dataclass(frozen=True)
class Client:
    """A client that the run simulates.

    Attributes:
      data: where its images are from, if not `files`.
      split: of the data.
      files: pictures, cropped to the centre square.
      classes: of the files; what the network says of them by default.
      images: how many of the data, drawn at random.
      distractors: how many other images of the data a reconstruction is compared with for IIP.
      training: BatchNorm layers normalise with the batch's moments.
      statistics: what it betrays of the moments at BatchNorm layers, see `Evidence`.
      local_steps: 0 for a gradient; else so many SGD steps, over the images in order.
      local_lr: their learning rate.
      local_batch: images of each step; all by default.
      defence: what it does to the gradient or update before it is sent.
    """

    data: data.Source = dataclasses.field(default_factory=data.Source)
    split: Split = "test"
    files: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    images: int = 8
    distractors: int = 1000
    training: bool = False
    statistics: evidence.Statistics = "running"
    local_steps: int = 0
    local_lr: float = 0.01
    local_batch: int | None = None
    defence: Defence = dataclasses.field(default_factory=Defence)

    def __post_init__(self) -> None:
        if self.images < 1 or self.distractors < 0 or self.local_steps < 0:
            raise ValueError("images must be at least 1, distractors and local_steps at least 0")
        if self.classes and len(self.classes) != len(self.files):
            raise ValueError(f"{len(self.classes)} classes are given for {len(self.files)} files")
        if self.local_batch is not None and self.local_batch < 1:
            raise ValueError(f"local_batch must be at least 1, not {self.local_batch}")

    def local(self, images: int) -> Local | None:
        """Its local steps: batch after batch, from the front again after the last image."""
        if not self.local_steps:
            return None
        size = min(self.local_batch or images, images)
        order = np.arange(self.local_steps * size) % images
        return Local(self.local_lr, tuple(map(tuple, order.reshape(-1, size).tolist())))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a config file holds.

    Attributes:
      network: the client's and the attacker's.
      client: a simulated one; or
      evidence: the files FILE.safetensors and FILE.json of a real one, as FILE, and
      originals: pictures that were behind it, to score against; may be unknown, and
      original_classes: theirs.
      labels: how classes are restored, see `jinv.federated.labels`; "joint" optimises them with the
        images (DLG); "known" gives the client's to the attacker. Where the client took local
        steps, every seed without a consensus tries another order of them over its batches.
      size: of the images; the network's by default.
      gray: optimise gray images.
      registration: how candidates are moved onto each other before their consensus is taken:
        "none", by a sub-pixel "shift", along their optical "flow".
      knows_defence: the attacker compares gradients as the client would have sent them.
      lpips_vgg16: torchvision's vgg16-397923af.pth, which LPIPS needs.
      delta: of the epsilon that is reported where noise was added.
      class_names: a text file with one name a line.
      seed: of everything random.
      trials: how many clients, of seeds seed, seed + 1, ...
      attack: the mathematics. In a file it may begin with `preset: NAME`; keys beside it count
        more.
      execution: devices and memory, without influence on the result beyond rounding.
      run: how it goes, without influence on the result.
    """

    network: Network
    client: Client | None = None
    evidence: str | None = None
    originals: tuple[str, ...] = ()
    original_classes: tuple[int, ...] = ()
    labels: str = "ilrg"
    size: int | None = None
    gray: bool = False
    registration: str = "shift"
    knows_defence: bool = True
    lpips_vgg16: str | None = None
    delta: float = 1e-5
    class_names: str | None = None
    seed: int = 0
    trials: int = 1
    attack: gradient_inversion.Config = dataclasses.field(default_factory=gradient_inversion.Config)
    execution: gradient_inversion.Execution = dataclasses.field(
        default_factory=gradient_inversion.Execution
    )
    run: run_folder.Options = dataclasses.field(default_factory=run_folder.Options)

    def __post_init__(self) -> None:
        checks.one_of("labels", self.labels, (*labels.METHODS, "joint", "known"))
        checks.one_of("registration", self.registration, registration.REGISTRATIONS)
        if (self.client is None) == (self.evidence is None):
            raise ValueError("the config needs a client to simulate, or evidence of a real one")
        if self.originals and self.client is not None:
            raise ValueError("originals belong to evidence; a simulated client has its own images")
        if len(self.original_classes) not in (0, len(self.originals)):
            raise ValueError(
                f"{len(self.original_classes)} classes for {len(self.originals)} originals"
            )
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, not {self.trials}")


def recipe_from(tree: dict[str, Any]) -> Recipe:
    """A config file's tree as a `Recipe`, its preset applied."""
    return configs.build(Recipe, configs.with_preset(tree, PRESETS))


@dataclasses.dataclass(frozen=True)
class _Scored:
    """Reconstructions beside their originals, in the originals' order."""

    pixels: np.ndarray
    scores: dict[str, list[float] | float | None]

    def mean(self, name: str) -> float | None:
        """Over the images; None if it is not available."""
        value = self.scores[name]
        return None if value is None else float(np.mean(value))


class Leakage:
    """A recipe with its network and evidence: everything that can be wrong has been found.

    Attributes:
      held: what the attacker has.
      secret: what scoring knows, None for a real client whose images are not given.
      label_table: method -> (its counts, or why there are none).
      classes: of every image, as restored; None if they are optimised.
      attack: what `optimise.run` takes.
      ablation: the same without the gradient, None where nothing else ties images to the evidence.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.net = recipe.network.load()
        self.names = data.class_names(self.net.classes, recipe.class_names)
        keys = jax.random.split(jax.random.key(recipe.seed), 4)
        self.key, self.noise_key, self.client_key, self.defence_key = keys
        self.distractors: np.ndarray | None = None
        self.held, self.secret = self._evidence()
        self.label_table = self._restored()
        self.classes = self._classes()
        space = self.net.preprocessing
        self.space = space.gray() if recipe.gray else space
        self.attack = self._build(recipe.attack, self._ways(), recipe.execution)
        self.ablation = None
        if recipe.attack.gradient and self.attack.data.moments:
            alone = recipe.attack.without_gradient()
            known = self.classes or [0] * self.held.images  # without a gradient none matter
            execution = recipe.execution.for_one_seed(self.held.images)
            self.ablation = self._build(alone, known, execution)

    def _build(
        self,
        config: gradient_inversion.Config,
        classes: Sequence[int] | Sequence[Sequence[int]] | None,
        execution: gradient_inversion.Execution,
    ) -> gradient_inversion.Attack:
        recipe = self.recipe
        return gradient_inversion.build(
            config,
            self.net,
            self.held,
            classes,
            size=recipe.size,
            space=self.space,
            register=registration.REGISTRATIONS[recipe.registration],
            defence=self.known_defence,
            execution=execution,
        )

    # --- the client: nothing below this line's methods but scoring reads the secret ---------------

    def _evidence(self) -> tuple[Evidence, Secret | None]:
        recipe, net = self.recipe, self.net
        size = recipe.size or net.preprocessing.size
        if recipe.evidence is not None:
            held = evidence.load(recipe.evidence, net)
            if not recipe.originals:
                return held, None
            return held, self._secret(data.image_files(recipe.originals, size), held.images)
        client = recipe.client
        assert client is not None
        if client.files:
            pixels, classes = data.image_files(client.files, size), client.classes
        else:
            pixels, classes = self._drawn(client, size)
        images = self._normalised(pixels)
        chosen = list(classes) or net(images).logits.argmax(-1).tolist()
        held, secret = evidence.simulate(
            net,
            images,
            chosen,
            training=client.training,
            statistics=client.statistics,
            local=client.local(len(pixels)),
        )
        return defences.apply(client.defence, self.defence_key, held), secret

    def _secret(self, pixels: np.ndarray, images: int) -> Secret:
        if len(pixels) != images:
            raise ValueError(f"the evidence is of {images} images; {len(pixels)} originals given")
        classes = self.recipe.original_classes or (-1,) * images
        return Secret(np.asarray(self._normalised(pixels)), np.asarray(classes))

    def _drawn(self, client: Client, size: int) -> tuple[np.ndarray, tuple[int, ...]]:
        everything = client.data.load(client.split, size)
        if everything.has_attributes:
            raise ValueError("labels are attributes: a client's images have classes")
        wanted = client.images + client.distractors
        if client.images > len(everything):
            raise ValueError(f"{client.images} images wanted; the data has {len(everything)}")
        order = np.asarray(jax.random.permutation(self.client_key, len(everything)))[:wanted]
        drawn = everything.take(order)
        if drawn.images.shape[1:3] != (size, size):
            raise ValueError(
                f"{self.net.name} takes images of {size} px, the data's are "
                f"{drawn.images.shape[1]} px: set size: {drawn.images.shape[1]}"
            )
        if len(everything.classes) > self.net.classes:
            raise ValueError(
                f"{self.net.name} knows {self.net.classes} classes, the data has "
                f"{len(everything.classes)}"
            )
        if self.recipe.class_names is None:
            self.names = everything.classes
        self.distractors = drawn.images[client.images :] / 255
        labelled = tuple(map(int, drawn.labels[: client.images]))
        return drawn.images[: client.images], labelled

    def _normalised(self, pixels: np.ndarray) -> jax.Array:
        """Bytes (K, H, W, 1 or 3) as the network wants them."""
        wanted = self.net.preprocessing
        values = jnp.asarray(pixels / np.float32(255))
        if wanted.channels == 1:
            values = values.mean(-1, keepdims=True)
        own = judging.PIXELS_GRAY if values.shape[-1] == 1 else judging.PIXELS_RGB
        return image.convert(values, own, wanted)

    # --- the attacker -----------------------------------------------------------------------------

    @property
    def known_defence(self) -> Defence:
        """What the attacker knows that the client did."""
        recipe = self.recipe
        return recipe.client.defence if recipe.client and recipe.knows_defence else Defence()

    def _restored(self) -> dict[str, np.ndarray | str]:
        """Counts by every method, or why it does not apply."""
        clipped = self.known_defence.clip is not None
        try:
            head = labels.head_of(self.net, self.held, scaled=clipped)
        except ValueError as error:
            return dict.fromkeys(labels.METHODS, str(error))
        found: dict[str, np.ndarray | str] = {}
        for method in labels.METHODS:
            try:
                found[method] = labels.restore(head, method)
            except ValueError as error:
                found[method] = str(error)
        return found

    def _classes(self) -> list[int] | None:
        method = self.recipe.labels
        if method == "joint":
            return None
        if method == "known":
            if self.secret is None or self.secret.labels.min() < 0:
                raise ValueError("labels: known needs the classes of the client's images")
            return sorted(self.secret.labels.tolist())
        counts = self.label_table[method]
        if isinstance(counts, str):
            raise ValueError(f"cannot restore labels by {method!r}: {counts}")
        return labels.as_list(counts)

    def _ways(self) -> list[int] | list[list[int]] | None:
        """Classes for all seeds, or of every one where local steps make their order matter.

        Seeds with a consensus are images of the same classes.
        """
        config, local = self.recipe.attack, self.held.local
        if self.classes is None or local is None or (config.seeds > 1 and config.group):
            return self.classes
        ways = labels.orders(self.classes, local.batches, config.seeds, self.recipe.seed)
        return [ways[i % len(ways)] for i in range(config.seeds)]

    def run(self, run: run_folder.Session) -> dict[str, Any]:
        """Attack, score and write the results; returns the summary (of the main process)."""
        ablated = None if self.ablation is None else self._ablated(run)
        state = self._optimise(
            run, self.attack, self._on_the_way if self.secret is not None else None
        )
        distances = parallel.fetch(self.attack.distances(state.best_images, self.attack.data))
        found, losses = parallel.fetch((state.best_images, state.best_loss))
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(run, found, losses, distances, ablated)),
            run_folder.SessionError,
        )
        return summary

    def _optimise(
        self, run: run_folder.Session, attack: gradient_inversion.Attack, score: Any = None
    ) -> Any:
        return run.run(
            attack.phases,
            self.key,
            attack.initial(self.noise_key),
            attack.data,
            pictures=lambda found: page.png(image.grid(self.pixels(_images(found)[0]))),
            score=score,
        )

    def _ablated(self, run: run_folder.Session) -> np.ndarray:
        """Images without the gradient, from a run of its own in a folder below."""
        assert self.ablation is not None
        own = run.part(ABLATION)
        if not own.finished:
            parallel.say("without the gradient, from BatchNorm statistics alone:")
            state = self._optimise(own, self.ablation)
            images = parallel.fetch(_images(state.best_images))[0]

            def keep() -> None:
                self._write_pictures(own.folder, self.pixels(images), "image")
                own.finish({"seconds": own.seconds, "steps": len(own.metrics.rows)})

            parallel.on_main(keep, run_folder.SessionError)
            if own.interrupted:
                raise run_folder.Interrupted(
                    f"{run.folder}: stopped after {ABLATION}; go on with --resume", own.interrupted
                )
        files = sorted((own.folder / "images").glob("*.png"))
        return np.stack([page.read_png(file) for file in files])

    def values(self, images: np.ndarray) -> np.ndarray:
        """Images (K, H, W, C) as pixels in [0, 1], not rounded, as they are scored."""
        return np.clip(np.asarray(image.denormalise(jnp.asarray(images), self.space)), 0, 1)

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """The same as the bytes that are saved."""
        return image.to_bytes(self.values(images))

    # --- scoring ----------------------------------------------------------------------------------

    @functools.cached_property
    def truth(self) -> np.ndarray:
        """The client's images as pixels in [0, 1], with as many channels as the attack's."""
        assert self.secret is not None
        images = image.denormalise(jnp.asarray(self.secret.images), self.net.preprocessing)
        pixels = np.clip(np.asarray(images, np.float64), 0, 1)
        return pixels.mean(-1, keepdims=True) if self.recipe.gray else pixels

    @functools.cached_property
    def _lpips(self) -> lpips.Distance | str:
        """How to measure, or why that cannot be."""
        try:
            return lpips.load(self.recipe.lpips_vgg16)
        except FileNotFoundError as error:
            return str(error)

    def _on_the_way(self, found: Any) -> dict[str, float]:
        """Mean PSNR of the first seed."""
        pixels = self.values(_images(found)[0])
        order = similarity.match(pixels, self.truth)
        return {"psnr": float(similarity.psnr(pixels[order], self.truth).mean())}

    def _scored(self, values: np.ndarray) -> _Scored:
        """Pixels in [0, 1], (K, H, W, C), matched to the originals and scored."""
        values = values[similarity.match(values, self.truth)]
        candidates = self.truth
        if self.distractors is not None and len(self.distractors):
            others = self.distractors
            if others.shape[-1] != self.truth.shape[-1]:
                others = np.repeat(others, self.truth.shape[-1], -1)
            candidates = np.concatenate([self.truth, others])
        measure = self._lpips
        scores: dict[str, list[float] | float | None] = {
            "psnr": _floats(similarity.psnr(values, self.truth)),
            "ssim": _floats(similarity.ssim(values, self.truth)),
            "lpips": None if isinstance(measure, str) else _floats(measure(values, self.truth)),
            "fft_2d": _floats(similarity.fft_2d(values, self.truth)),
            "iip": similarity.identifiable(values, candidates) if len(candidates) > 1 else None,
        }
        return _Scored(image.to_bytes(values), scores)

    def _label_scores(self) -> dict[str, dict[str, Any]]:
        """Every method's counts against the truth, as far as both exist."""
        found: dict[str, dict[str, Any]] = {}
        for method, counts in self.label_table.items():
            if isinstance(counts, str):
                found[method] = {"not_available": counts}
            elif self.secret is None or self.secret.labels.min() < 0:
                found[method] = {"restored": labels.as_list(counts)}
            else:
                found[method] = {"restored": labels.as_list(counts), **self._right(counts)}
        return found

    def _right(self, counts: np.ndarray) -> dict[str, float]:
        assert self.secret is not None
        return labels.scores(counts, np.bincount(self.secret.labels, minlength=self.net.classes))

    # --- results ----------------------------------------------------------------------------------

    def _write_pictures(self, folder: Path, pixels: np.ndarray, name: str) -> dict[str, str]:
        """One PNG an image; returns sha256 by file name."""
        (folder / "images").mkdir(parents=True, exist_ok=True)
        files = {}
        for i, picture in enumerate(pixels):
            file = f"images/{i:03d}_{name}.png"
            encoded = page.png(picture)
            write_atomic(folder / file, encoded)
            files[file] = hashlib.sha256(encoded).hexdigest()
        return files

    def _write(
        self,
        run: run_folder.Session,
        found: Any,
        losses: np.ndarray,
        distances: np.ndarray,
        ablated: np.ndarray | None,
    ) -> dict[str, Any]:
        chosen = int(np.nanargmin(distances if self.recipe.attack.gradient else losses))
        values = self.values(_images(found)[chosen])
        known = self.secret is not None
        unknown = _Scored(image.to_bytes(values), dict.fromkeys(SCORES))
        scored = self._scored(values) if known else unknown
        bare = self._scored(ablated / 255) if known and ablated is not None else None
        rows = {}
        if known:
            rows["original"] = image.to_bytes(self.truth)
        rows["reconstruction"] = scored.pixels
        if ablated is not None:
            rows["BN only"] = ablated if bare is None else bare.pixels
        files = self._write_pictures(run.folder, scored.pixels, "reconstruction")
        page.write_png(run.folder / "grid.png", image.rows(list(rows.values())))
        machine = hardware.describe()
        svg = _curves(run)
        write_atomic(run.folder / "curves.svg", svg)
        summary = self._summary(run, losses, distances, chosen, scored, bare)
        summary["labels"] = self._used_labels(found, chosen)
        summary |= {"files": files, "versions": {name: machine[name] for name in VERSIONS}}
        page.write_html(
            run.folder / "report.html",
            f"What a gradient of {self.net.name} betrays",
            self._sections(summary, rows, svg, machine, run),
            lead=self._lead(),
        )
        run.finish(summary)
        return summary

    def _summary(
        self,
        run: run_folder.Session,
        losses: np.ndarray,
        distances: np.ndarray,
        chosen: int,
        scored: _Scored,
        bare: _Scored | None,
    ) -> dict[str, Any]:
        devices = self.attack.mesh.devices.flatten()
        terms = [n for n in run.metrics.columns() if n not in ("step", "phase", "loss")]
        return {
            "model": self.net.name,
            "device": f"{len(devices)} x {devices[0].device_kind}",
            "evidence": self._circumstances(),
            "steps": len(run.metrics.rows),
            "seeds": self.recipe.attack.seeds,
            "seconds": round(run.seconds, 3),
            "seconds_per_step": round(run.clock.stepping / max(run.clock.steps, 1), 6),
            "compile_seconds": round(run.clock.compiling, 3),
            "loss": float(losses[chosen]),
            "distance": float(distances[chosen]),
            "distances": _floats(distances),
            "chosen_seed": chosen,
            "terms": {name: run.metrics.column(name)[-1] for name in terms},
            "scores": _means(scored) if self.secret is not None else None,
            "bn_only": None if bare is None else _means(bare),
            "per_image": scored.scores if self.secret is not None else None,
            "not_available": self._not_available(scored) if self.secret is not None else {},
            "label_methods": self._label_scores(),
        }

    def _not_available(self, scored: _Scored) -> dict[str, str]:
        """Score -> why there is none."""
        found = {}
        if isinstance(self._lpips, str):
            found["lpips"] = self._lpips
        if scored.scores["iip"] is None:
            found["iip"] = "one image, and no others to tell it from"
        return found

    def _circumstances(self) -> dict[str, Any]:
        held, client = self.held, self.recipe.client
        told: dict[str, Any] = {
            "images": held.images,
            "training": held.training,
            "statistics": held.statistics,
            "local_steps": len(held.local.batches) if held.local else 0,
            "defence": None,
            "epsilon": None,
            "delta": None,
        }
        if client is not None:
            told["defence"] = client.defence.describe()
            noise = client.defence.noise_multiplier
            if noise:
                told["epsilon"] = privacy.epsilon(noise, self.recipe.delta)
                told["delta"] = self.recipe.delta
        return told

    def _used_labels(self, found: Any, chosen: int) -> dict[str, Any]:
        classes = self.classes
        if isinstance(found, Candidates):
            classes = sorted(found.labels[chosen].argmax(-1).tolist())
        assert classes is not None
        used: dict[str, Any] = {"method": self.recipe.labels, "restored": classes}
        if self.secret is not None and self.secret.labels.min() >= 0:
            used["truth"] = sorted(self.secret.labels.tolist())
            used |= self._right(np.bincount(classes, minlength=self.net.classes))
        return used

    def _lead(self) -> str:
        held = self.held
        what = (
            f"a weight update of {len(held.local.batches)} local steps"
            if held.local
            else "gradient"
        )
        mode = "training" if held.training else "evaluation"
        plural = "s" if held.images > 1 else ""
        return (
            f"{held.images} image{plural} out of the {what} of a client in {mode} mode. "
            f"{_KNOWN[held.statistics]} Labels: {self.recipe.labels}."
        )

    def _sections(
        self,
        summary: dict[str, Any],
        rows: Mapping[str, np.ndarray],
        svg: bytes,
        machine: Mapping[str, str],
        run: run_folder.Session,
    ) -> list[page.Section]:
        size = max(1, 112 // next(iter(rows.values())).shape[1])
        sheet = page.png(image.rows(list(rows.values()), size))
        sections = [
            page.Section(
                "Images",
                page.Figure(sheet, f"Rows: {', '.join(rows)}"),
                f"From top to bottom: {', '.join(rows)}; one column an image.",
            )
        ]
        if summary["scores"] is not None:
            sections += self._score_sections(summary)
        sections.append(self._label_section(summary))
        if self.recipe.attack.seeds > 1:
            sections.append(
                page.Section(
                    "Seeds",
                    page.Table(
                        ("seed", "distance of gradients"),
                        [(str(i), d) for i, d in enumerate(summary["distances"])],
                    ),
                    f"Seed {summary['chosen_seed']} comes nearest and is shown.",
                )
            )
        timing = {
            "seconds": f"{run.seconds:.1f}",
            "seconds a step": f"{summary['seconds_per_step']:.4f}",
            "seconds compiling": f"{summary['compile_seconds']:.1f}",
            "devices": summary["device"],
        }
        told = {k: "" if v is None else str(v) for k, v in summary["evidence"].items()}
        return [
            *sections,
            page.Section(
                "Evidence", page.Table(("", "value"), tuple(told.items())), self._privacy(summary)
            ),
            page.Section("Curves", page.Figure(svg, "Every term at every step")),
            page.Section(
                "Hardware and time",
                page.Table(("", "value"), tuple((dict(machine) | timing).items())),
            ),
            page.Section("Config", page.Text(configs.to_yaml(self.recipe))),
        ]

    def _score_sections(self, summary: dict[str, Any]) -> list[page.Section]:
        header = ["", *(title for title, _ in SCORES.values())]
        lines = [["reconstruction", *_cells(summary["scores"])]]
        intro = "Means over the images, each matched to an original by linear assignment."
        if summary["bn_only"] is not None:
            lines.append(["BatchNorm statistics alone", *_cells(summary["bn_only"])])
            intro += " The second row is the same attack without the gradient."
        else:
            intro += " No BatchNorm statistics are known, so there is no attack without gradient."
        for name, reason in summary["not_available"].items():
            intro += f" {SCORES[name][0]} is not available: {reason}"
        each = {k: v for k, v in summary["per_image"].items() if isinstance(v, list)}
        per_image = page.Table(
            ("image", *(SCORES[name][0] for name in each)),
            [(str(i), *values) for i, values in enumerate(zip(*each.values(), strict=True))],
        )
        return [
            page.Section("Scores", page.Table(header, lines), intro),
            page.Section("Scores by image", per_image),
        ]

    def _label_section(self, summary: dict[str, Any]) -> page.Section:
        columns = ("accuracy", "precision", "recall", "exact")
        lines = []
        for method, found in summary["label_methods"].items():
            told = found.get("not_available") or self._named(found["restored"])
            lines.append([method, *(_cell(found.get(name)) for name in columns), told])
        used = summary["labels"]
        if used["method"] not in summary["label_methods"]:
            told = self._named(used["restored"])
            lines.append([used["method"], *(_cell(used.get(name)) for name in columns), told])
        intro = f"Used: {used['method']}."
        if "truth" in used:
            intro += f" The truth: {self._named(used['truth'])}."
        return page.Section("Labels", page.Table(("method", *columns, "found"), lines), intro)

    def _named(self, classes: Sequence[int]) -> str:
        counted = {c: classes.count(c) for c in dict.fromkeys(classes)}
        return ", ".join(self.names[c] + (f" x {n}" if n > 1 else "") for c, n in counted.items())

    def _privacy(self, summary: dict[str, Any]) -> str:
        told = summary["evidence"]
        if told["epsilon"] is None:
            return ""
        return (
            f"The noise gives the client's whole update ({told['epsilon']:.3g}, "
            f"{told['delta']:g}) differential privacy (adding or removing one client, one round)."
        )


_KNOWN = {
    "none": "Nothing is known of BatchNorm statistics.",
    "running": "Of BatchNorm statistics the network's running ones are known.",
    "exact": "BatchNorm statistics of the very batch are known.",
    "update": "BatchNorm statistics are solved from the client's new running ones.",
}


def _images(found: Any) -> Any:
    return found.images if isinstance(found, Candidates) else found


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


def _means(scored: _Scored) -> dict[str, float | None]:
    return {name: scored.mean(name) for name in SCORES}


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cells(scores: Mapping[str, float | None]) -> list[str]:
    return ["not available" if scores[name] is None else _cell(scores[name]) for name in SCORES]


def _curves(run: run_folder.Session) -> bytes:
    terms = [name for name in run.metrics.columns() if name not in ("step", "phase")]
    steps = [int(step) for step in run.metrics.column("step")]
    return curves.plot({name: run.metrics.column(name) for name in terms}, steps)


def prepare(recipe: Recipe) -> Leakage:
    """The recipe with everything loaded, in every process or in none.

    Raises:
      ValueError: the mistake, in every process if one process has it.
    """
    return parallel.everywhere(lambda: Leakage(recipe))
