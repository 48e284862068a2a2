"""Invert a client's gradient or weight update into its images: GradInversion and its relatives.

    jinv invert-gradients --config gradients_small --out out/small
    jinv invert-gradients --config gradients_mobilenet_v2 --out out/m2 --attack.steps 2000
    jinv invert-gradients --config gradients_defences --out out/sweep

A config names the network, and either a `client` to simulate (its images, mode, local steps and
defence) or the `evidence` of a real one: FILE.safetensors, .pth or .npz, with the gradient under
torch's names, and FILE.json (see docs/gradients.md). Every key can be overridden on the command
line (`--config F --help` lists them). Ctrl-C or SIGTERM saves a checkpoint; --resume goes on to the
very same images. A finished run is replaced only with --overwrite.

The output folder holds images/NNN_reconstruction.png, grid.png (original, reconstruction, BN only,
from top to bottom), curves.svg, report.html, metrics.csv, scores.csv (PSNR on the way),
progress/*.png, bn_only/ (the same attack without the gradient, where BatchNorm statistics are
known) and, last of all, summary.json. Variants called "NAME NUMBER" are points of a curve NAME.
"""

# The attack sees the network and the evidence. The client's own images and labels are a `Secret`
# that scoring alone reads; `labels: known` is the one way to hand their classes to the attacker.

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jinv import checks, data, image, parallel, privacy
from jinv.attacks import gradient_inversion
from jinv.attacks.gradient_inversion import PRESETS, Candidates
from jinv.checks import Class, Count, File, Range, Seed, Word
from jinv.federated import client as clients
from jinv.federated import defences, evidence, labels, registration
from jinv.federated.client import Client
from jinv.federated.defences import Defence
from jinv.federated.evidence import Evidence, Secret
from jinv.files import write_atomic
from jinv.models.network import Network
from jinv.reports import curves, gradients, page
from jinv.runs import attack_run, command, hardware, study
from jinv.runs import config as configs
from jinv.runs.run_folder import FolderError, RunFolder
from jinv.runs.signals import Interrupted
from jinv.scores.reconstruction import SCORES, Scored, Scorer, perceptual

LabelMethod = Annotated[
    str, Word(lambda: labels.METHODS, ("joint", "known").__contains__, "joint, known")
]
ABLATION = "bn_only"
"""Folder of the run without the gradient."""


@dataclasses.dataclass(frozen=True)
class Config:
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
      size: of the images, one side or height and width; the network's by default.
      gray: optimise gray images.
      registration: how candidates are moved onto each other before their consensus is taken:
        "none", by a sub-pixel "shift", along their optical "flow".
      knows_defence: the attacker compares gradients as the client would have sent them.
      lpips_vgg16: torchvision's vgg16-397923af.pth, which LPIPS needs.
      delta: of the epsilon that is reported where noise was added.
      class_names: a text file with one name a line, or one of "imagenet", "cifar10",
        "fashion_mnist", "emnist-letters" and so on; by default those of the client's data, or the
        network's own.
      seed: of everything random.
      trials: how many clients, of seeds seed, seed + 1, ...
      attack: the mathematics. In a file it may begin with `preset: NAME`; keys beside it count
        more.
      execution: devices and memory, without influence on the result beyond rounding.
      run: how it goes, without influence on the result.
    """

    network: Network
    client: Client | None = None
    evidence: Annotated[str, File(endings=(*evidence.ENDINGS, ".json"))] | None = None
    originals: tuple[Annotated[str, File()], ...] = ()
    original_classes: tuple[Class, ...] = ()
    labels: LabelMethod = "ilrg"
    size: Count | tuple[Count, Count] | None = None
    gray: bool = False
    registration: registration.Name = "shift"
    knows_defence: bool = True
    lpips_vgg16: Annotated[str, File()] | None = None
    delta: Annotated[float, Range(0, 1, above=True, below=True)] = 1e-5
    class_names: data.ClassNames | None = None
    seed: Seed = 0
    trials: Count = 1
    attack: gradient_inversion.Config = dataclasses.field(default_factory=gradient_inversion.Config)
    execution: gradient_inversion.Execution = dataclasses.field(
        default_factory=gradient_inversion.Execution
    )
    run: attack_run.Options = dataclasses.field(default_factory=attack_run.Options)

    def __post_init__(self) -> None:
        checks.fields(self)
        if (self.client is None) == (self.evidence is None):
            raise ValueError("the config needs a client to simulate, or evidence of a real one")
        if self.originals and self.client is not None:
            raise ValueError("originals belong to evidence; a simulated client has its own images")
        if self.client is None:
            checks.unused(self, "evidence does not say how it was defended", "knows_defence")
        if len(self.original_classes) not in (0, len(self.originals)):
            raise ValueError(
                f"{len(self.original_classes)} classes for {len(self.originals)} originals"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(command.Summary):
    """What a run's summary.json holds; times are without the run without the gradient.

    Attributes:
      model: the network's name.
      evidence: images, training (victim's mode), statistics (what is known of BatchNorm: none,
        running, exact, update), local_steps, defence (in words), epsilon and delta of its noise
        (client-level, one round); null where they do not apply.
      steps: steps done.
      seeds: candidates of the batch, at once.
      loss: of the seed that is shown.
      distance: of gradients, of the seed that is shown: the least of
      distances: every seed's.
      chosen_seed: which it is.
      terms: raw value of every term of the objective at the last step.
      labels: method, restored, and with a known truth: truth, accuracy (share of labels right with
        multiplicity), precision, recall (of classes), exact (0 or 1).
      label_methods: every method on the same evidence: the same keys, or not_available: reason.
      scores: psnr [dB], ssim, lpips, fft_2d (means over images), iip (share of images that are
        their reconstruction's nearest among all of the client's and the distractors); null where
        nothing is known to score against.
      bn_only: the same of the attack without the gradient; null without such.
      per_image: the same before averaging, in the originals' order.
      not_available: score -> why it is null.
      files: sha256 of every image file, by name.
    """

    model: str
    evidence: dict[str, Any]
    steps: int
    seeds: int
    loss: float
    distance: float
    distances: list[float]
    chosen_seed: int
    terms: dict[str, float]
    labels: dict[str, Any]
    label_methods: dict[str, Any]
    scores: dict[str, float | None] | None
    bn_only: dict[str, float | None] | None
    per_image: dict[str, Any] | None
    not_available: dict[str, str]
    files: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySummary:
    """What the summary.json of a study holds.

    Attributes:
      runs: folder -> that run's summary.
      variants: name -> {trials, psnr, ssim, iip, labels (accuracy): means over trials, epsilon}.
      seconds: of all runs.
    """

    runs: dict[str, Any]
    variants: dict[str, Any]
    seconds: float


class GradientInversion(command.Loaded):
    """A config with its network and evidence.

    Attributes:
      config: the config.
      held: what the attacker has.
      secret: what scoring knows, None for a real client whose images are not given.
      label_table: method -> its counts, or why there are none.
      classes: of every image, as restored; None if they are optimised.
      attack: what `optimise.run` takes.
      ablation: the same without the gradient, None where nothing else ties images to the evidence.
    """

    held: Evidence
    secret: Secret | None
    label_table: dict[str, np.ndarray | str]
    classes: list[int] | None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.net = config.network.load()
        net = self.net
        self._names = data.class_names(net.classes, config.class_names, net.class_names)
        self._perceptual = perceptual(config.lpips_vgg16)
        client = config.client
        self._epsilon = None
        if client is not None and client.defence.noise_multiplier:
            self._epsilon = privacy.epsilon(client.defence.noise_multiplier, config.delta)
        if client is not None:
            self._send = evidence.simulator(
                self.net,
                training=client.training,
                statistics=client.statistics,
                local=client.local(),
            )
        self._draw()
        space = self.net.preprocessing
        self.space = space.gray() if config.gray else space
        self.attack = self._build(config.attack, self._ways(), config.execution)
        self.ablation = None
        if config.attack.gradient and self.attack.data.moments:
            self.ablation = self._build(
                config.attack.without_gradient(),
                self._any_classes(),
                config.execution.for_one_seed(self.held.images),
            )

    def with_seed(self, seed: int) -> Self:
        """Return the same with another seed: other noise, another simulated client."""
        if seed == self.config.seed:
            return self
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, seed=seed, trials=1)
        other._draw()
        other.attack = self.attack.with_evidence(other.held, other._ways())
        if self.ablation is not None:
            other.ablation = self.ablation.with_evidence(other.held, other._any_classes())
        return other

    def _build(
        self,
        config: gradient_inversion.Config,
        classes: Sequence[int] | Sequence[Sequence[int]] | None,
        execution: gradient_inversion.Execution,
    ) -> gradient_inversion.Attack:
        return gradient_inversion.build(
            config,
            self.net,
            self.held,
            classes,
            size=self.config.size,
            space=self.space,
            register=registration.REGISTRATIONS[self.config.registration],
            defence=self._known_defence,
            execution=execution,
        )

    # --- the client: below `_draw`, scoring alone reads the secret --------------------------------

    def _draw(self) -> None:
        """Draw what the seed decides: keys, and a simulated client with its images."""
        config, net = self.config, self.net
        keys = jax.random.split(jax.random.key(config.seed), 4)
        self.key, self.noise_key, client_key, defence_key = keys
        size = config.size or net.preprocessing.size
        self.names = self._names
        distractors = None
        if config.client is None:
            assert config.evidence is not None
            self.held = evidence.load(config.evidence, net)
            self.secret = None
            if config.originals:
                self.secret = self._given(data.image_files(config.originals, size))
        else:
            drawn = clients.draw(config.client, net, size, client_key)
            images = clients.normalised(drawn.pixels, net.preprocessing)
            chosen = list(drawn.classes) or net(images).logits.argmax(-1).tolist()
            held, self.secret = self._send(images, chosen)
            self.held = defences.apply(config.client.defence, defence_key, held)
            distractors = drawn.distractors
            if drawn.names is not None and config.class_names is None:
                self.names = (*drawn.names, *self._names[len(drawn.names) :])
        self.scorer = None
        if self.secret is not None:
            self.scorer = Scorer(self._truth(self.secret), distractors, self._perceptual)
        self.label_table = self._restored()
        self.classes = self._classes()

    def _given(self, pixels: np.ndarray) -> Secret:
        images, given = self.held.images, self.config.original_classes
        if len(pixels) != images:
            raise ValueError(f"the evidence is of {images} images; {len(pixels)} originals given")
        if given and max(given) >= self.net.classes:
            raise ValueError(
                f"original_classes: {max(given)} is no class of {self.net.name}, which knows 0 to "
                f"{self.net.classes - 1}"
            )
        normalised = clients.normalised(pixels, self.net.preprocessing)
        return Secret(np.asarray(normalised), np.asarray(given or (-1,) * images))

    def _truth(self, secret: Secret) -> np.ndarray:
        """Return the client's images as pixels in [0, 1], with as many channels as the attack's."""
        images = image.denormalise(jnp.asarray(secret.images), self.net.preprocessing)
        pixels = np.clip(np.asarray(images, np.float64), 0, 1)
        return image.for_channels(pixels, 1) if self.config.gray else pixels

    # --- the attacker -----------------------------------------------------------------------------

    @property
    def _known_defence(self) -> Defence:
        """What the attacker knows that the client did."""
        client = self.config.client
        return client.defence if client and self.config.knows_defence else Defence()

    def _restored(self) -> dict[str, np.ndarray | str]:
        """Return every method's counts, or why it does not apply."""
        clipped = self._known_defence.clip is not None
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
        method = self.config.labels
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

    def _any_classes(self) -> list[int]:
        """Return classes for an attack without a gradient, to which none matter."""
        return self.classes or [0] * self.held.images

    def _ways(self) -> list[int] | list[list[int]] | None:
        """Return classes for all seeds, or of every one where local steps make their order matter.

        Seeds with a consensus are images of the same classes.
        """
        config, local = self.config.attack, self.held.local
        if self.classes is None or local is None or (config.seeds > 1 and config.group):
            return self.classes
        ways = labels.orders(self.classes, local.batches, config.seeds, self.config.seed)
        return [ways[i % len(ways)] for i in range(config.seeds)]

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Attack, score and write the results; return the summary (of the main process)."""
        ablated = None if self.ablation is None else self._ablated(folder, self.ablation)
        score = None if self.scorer is None else self._on_the_way
        state = self._optimise(folder, self.attack, score)
        distances = parallel.fetch(self.attack.distances(state.best_images, self.attack.data))
        found, losses = parallel.fetch((state.best_images, state.best_loss))
        summary: dict[str, Any] = {}
        parallel.on_main(
            lambda: summary.update(self._write(folder, found, losses, distances, ablated)),
            FolderError,
        )
        return summary

    def _optimise(
        self, folder: RunFolder, attack: gradient_inversion.Attack, score: Any = None
    ) -> Any:
        def pictures(found: Any) -> bytes:
            return page.png(image.grid(image.to_bytes(self.values(attack.shown(found)))))

        watch = attack_run.Watch(pictures, score)
        return attack_run.run(attack, self.key, self.noise_key, folder, self.config.run, watch)

    def _ablated(self, folder: RunFolder, ablation: gradient_inversion.Attack) -> np.ndarray:
        """Return pixels of an attack without the gradient, from a run in a folder below."""
        own = folder.part(ABLATION)
        if not own.finished:
            parallel.say("without the gradient, from BatchNorm statistics alone:")
            state = self._optimise(own, ablation)
            images = ablation.shown(parallel.fetch(state.best_images))

            def keep() -> None:
                pixels = image.to_bytes(self.values(images))
                page.write_pngs(own.path, _named(pixels, "image"))
                own.finish({"seconds": own.seconds, "steps": len(own.metrics)})

            parallel.on_main(keep, FolderError)
            if own.interrupted:
                raise Interrupted(
                    f"{folder.path}: stopped after {ABLATION}; go on with --resume",
                    own.interrupted,
                )
        files = sorted((own.path / "images").glob("*.png"))
        return np.stack([page.read_png(file) for file in files])

    def values(self, images: Any) -> np.ndarray:
        """Return images (K, H, W, C) as pixels in [0, 1], not rounded, as they are scored."""
        return np.clip(np.asarray(image.denormalise(jnp.asarray(images), self.space)), 0, 1)

    def _on_the_way(self, found: Any) -> dict[str, float]:
        """Return the mean PSNR of the first seed."""
        assert self.scorer is not None
        return {"psnr": self.scorer.psnr(self.values(self.attack.shown(found)))}

    # --- results ----------------------------------------------------------------------------------

    def _write(
        self,
        folder: RunFolder,
        found: Any,
        losses: np.ndarray,
        distances: np.ndarray,
        ablated: np.ndarray | None,
    ) -> dict[str, Any]:
        chosen = int(np.nanargmin(distances if self.config.attack.gradient else losses))
        images = found.images if isinstance(found, Candidates) else found
        values = self.values(images[chosen])
        scored = Scored(values, dict.fromkeys(SCORES)) if not self.scorer else self.scorer(values)
        bare = None
        if self.scorer and ablated is not None:
            bare = self.scorer(ablated / 255)
        rows = self._rows(scored, bare, ablated)
        page.write_png(folder.path / "grid.png", image.rows(list(rows.values())))
        files = page.write_pngs(folder.path, _named(rows["reconstruction"], "reconstruction"))
        known, log = self.scorer is not None, folder.metrics
        terms = log.terms()
        summary = Summary(
            **command.shared(folder, hardware.of_mesh(self.attack.mesh)),
            model=self.net.name,
            evidence=self._circumstances(),
            steps=len(log),
            seeds=self.config.attack.seeds,
            loss=float(losses[chosen]),
            distance=float(distances[chosen]),
            distances=[float(d) for d in distances],
            chosen_seed=chosen,
            terms={name: series[-1] for name, series in terms.items() if name != "loss"},
            labels=self._used_labels(found, chosen),
            label_methods=self._label_scores(),
            scores=scored.means() if known else None,
            bn_only=None if bare is None else bare.means(),
            per_image=scored.scores if known else None,
            not_available={} if self.scorer is None else self.scorer.missing(scored),
            files=files,
        )
        svg = curves.plot(terms, log.steps())
        write_atomic(folder.path / "curves.svg", svg)
        told = vars(summary)
        body = gradients.run_page(told, rows, svg, self.names)
        ending = page.ending(
            told,
            hardware.describe(),
            configs.to_yaml(self.config),
            {self.net.name: self.net.weights},
            devices=summary.device,
        )
        body.write(folder.path / "report.html", ending)
        return command.finish(folder, summary)

    def _rows(
        self, scored: Scored, bare: Scored | None, ablated: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Return the rows of the sheet as bytes: original, reconstruction, BN only."""
        rows = {}
        if self.scorer is not None:
            rows["original"] = image.to_bytes(self.scorer.truth)
        rows["reconstruction"] = image.to_bytes(scored.values)
        if ablated is not None:
            rows["BN only"] = ablated if bare is None else image.to_bytes(bare.values)
        return rows

    def _circumstances(self) -> dict[str, Any]:
        held, client = self.held, self.config.client
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
            if self._epsilon is not None:
                told |= {"epsilon": self._epsilon, "delta": self.config.delta}
        return told

    def _used_labels(self, found: Any, chosen: int) -> dict[str, Any]:
        classes = self.classes
        if isinstance(found, Candidates):
            classes = sorted(found.labels[chosen].argmax(-1).tolist())
        assert classes is not None
        used: dict[str, Any] = {"method": self.config.labels, "restored": classes}
        if self.secret is not None and self.secret.labels.min() >= 0:
            used["truth"] = sorted(self.secret.labels.tolist())
            used |= self._right(np.bincount(classes, minlength=self.net.classes))
        return used

    def _label_scores(self) -> dict[str, dict[str, Any]]:
        """Return every method's counts against the truth, as far as both exist."""
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


def _named(pixels: np.ndarray, name: str) -> dict[str, np.ndarray]:
    return {f"images/{i:03d}_{name}.png": picture for i, picture in enumerate(pixels)}


def compare(
    chosen: Sequence[study.Run], summaries: Sequence[dict[str, Any]], whole: RunFolder
) -> None:
    """Write the page and the summary of a study."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run, summary in zip(chosen, summaries, strict=True):
        found.setdefault(study.title(run.variant), []).append(summary)
    grids = {run.title: (whole.path / run.folder / "grid.png").read_bytes() for run in chosen}
    svg = gradients.leakage_curves(found)
    if svg is not None:
        write_atomic(whole.path / "curves.svg", svg)
    body = gradients.study_page(found, grids, svg)
    study.finish(whole, chosen, summaries, body, {"variants": gradients.variants(found)})


def _say(summary: dict[str, Any]) -> str:
    """Say how near the images came."""
    scores = summary["scores"]
    return "" if scores is None else f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.2f}"


COMMAND = command.Command(
    name="invert-gradients",
    about=str(__doc__),
    config=Config,
    load=GradientInversion,
    summary=Summary,
    files=(f"{ABLATION}/", *attack_run.FILES),
    say=_say,
    presets=PRESETS,
    compare=compare,
    free=(
        *command.FREE,
        *("originals", "original_classes", "client.distractors"),
        *("lpips_vgg16", "delta", "class_names"),
    ),
    study=StudySummary,
    less="--execution.seeds-at-once 1, --execution.images-at-once 1",
)
