"""What the sections of a recipe may not ask for together, and what to do instead. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.hf_folder import find_folder
from .report import LOCAL
from .strategy import choose
from .training_spec import TAUGHT, FeatureSpec, SoftSpec, TokenSpec

if TYPE_CHECKING:
    from .recipe import PreprocessSpec, Recipe


def conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    """(does it hold, what to say), a row a rule; each text starts with the key it is about."""
    of_task = _text_conflicts(recipe) if recipe.is_text else _image_conflicts(recipe)
    return [
        *of_task,
        *_network_conflicts(recipe),
        *_distill_conflicts(recipe),
        *_gate_conflicts(recipe),
    ]


def _image_conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    data, networks = recipe.data, [*recipe.teachers, recipe.student]
    trained = [n.train for n in networks] + [recipe.distill]
    for_texts = [name for name in ("tokenize", "text", "pair", "label") if getattr(data, name)]
    terms = () if recipe.distill is None else choose(recipe.distill).objectives
    tokens = [term.name for term in terms if isinstance(term, TokenSpec)]
    return [
        (
            bool(tokens),
            f"distill.objectives: {', '.join(tokens)} compares the tokens of texts; images have "
            "`hint`, `attention`, `reviewkd` and `rkd`",
        ),
        (
            bool(for_texts),
            f"data.{for_texts[0] if for_texts else ''}: is of texts, and the task is "
            f"{recipe.task}; set `task: text-classification`, or leave it out",
        ),
        (
            any(t is not None and t.augment.of_texts for t in trained),
            "augment.mask and span: are of texts; leave them out for images",
        ),
        (
            any(n.keep_layers is not None or n.init != "weights" for n in networks),
            "keep_layers and init: are of text encoders; leave them out for images",
        ),
        (
            any(n.is_trained for n in networks) and not _is_fully_given(data.preprocess),
            "data.preprocess: weights are given, and what they were trained with is not guessed; "
            "write preprocess with mean and std (`compress init` proposes one)",
        ),
    ]


def _text_conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    data, networks = recipe.data, [*recipe.teachers, recipe.student]
    trained = [n.train for n in networks] + [recipe.distill]
    plan = None if recipe.distill is None else choose(recipe.distill, is_text=True)
    terms = () if plan is None else plan.objectives
    features = [term for term in terms if isinstance(term, FeatureSpec)]
    maps = [term.name for term in features if not isinstance(term, TokenSpec)]
    return [
        (
            data.tokenize is None or data.tokenize.tokenizer is None,
            "data.tokenize: no network is an hf: folder, so nothing says how texts become tokens; "
            "write `tokenize: {tokenizer: tokenizer.json}`",
        ),
        (
            data.preprocess is not None,
            "data.preprocess: is of images; texts have `tokenize`",
        ),
        (
            any(t is not None and t.augment.of_images for t in trained),
            "augment: crops, flips and mixes are of images; texts have `mask` and `span`",
        ),
        (
            (d := recipe.distill) is not None and d.views != 1 and not d.augment.of_texts,
            "distill.views: every view of a text is the text itself; leave it out, or set "
            "`augment: {mask: 0.1, span: 0.25}`",
        ),
        (
            any(n.is_program or n.is_onnx for n in networks),
            "model: a text network is an hf: folder or FILE.py:factory here",
        ),
        (
            any(n.keep_layers is not None and not n.is_hf for n in networks),
            "keep_layers: names layers of an hf: folder; give one as `model`",
        ),
        (
            data.tokenize is not None and data.tokenize.trim and any(not n.is_hf for n in networks),
            "data.tokenize.trim: takes rows of the word embeddings of hf: folders; give one as "
            "`model` of every network, or leave `trim` out",
        ),
        (
            data.tokenize is not None and bool(data.tokenize.keep) and not data.tokenize.trim,
            "data.tokenize.keep: names what `trim: true` leaves in the vocabulary; add it",
        ),
        (
            data.tokenize is not None
            and (data.tokenize.pad == "max_length") != (recipe.export.sequence == "fixed"),
            "data.tokenize.pad: max_length goes with `export.sequence: fixed`, which sets it",
        ),
        (
            recipe.distill is not None and recipe.distill.target == "exits",
            "distill.target: exits are of images; use `ema`, `peers` or a teacher",
        ),
        (
            bool(maps),
            f"distill.objectives: {', '.join(maps)} compares feature maps of images; texts have "
            "`hidden` and `relations`",
        ),
        (
            recipe.quantize is not None and recipe.quantize.mode == "qat",
            "quantize.mode: QAT is of images; use ptq",
        ),
    ]


def _network_conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    teachers, student, distill = recipe.teachers, recipe.student, recipe.distill
    networks = [*teachers, student]
    given = [n for n in networks if n.weight_files and not (n.is_program or n.is_onnx)]
    folders = [folder for n in given if n.head == "keep" and (folder := find_folder(n.model))]
    is_joint = distill is not None and distill.target == "joint"
    return [
        (
            recipe.teacher == (),
            "teacher: an empty list; name a teacher, or leave the section out",
        ),
        (
            any(not t.is_trained and t.train is None for t in teachers) and not is_joint,
            "teacher: neither weights nor train is given, and an untrained teacher teaches noise; "
            "add `weights:` or `train: {epochs: 20}`",
        ),
        (
            distill is not None and student.train is not None,
            "student.train: the student is trained by `distill`; move these options there",
        ),
        (
            distill is None and student.train is None and not student.is_trained,
            "student: it has no weights, no teacher and no `train` section, so nothing would be "
            "learnt; add one of them",
        ),
        (
            any(t.is_onnx for t in teachers),
            "teacher.model: an .onnx file cannot teach here; give the network it was exported from",
        ),
        (
            student.is_onnx
            and any(
                (teachers, distill, recipe.prune, student.train, student.weights, student.args)
            ),
            "student.model: an .onnx file can only be quantized, proven and timed; leave out "
            "teacher, distill, prune, train, weights and args, or give FILE.py:factory",
        ),
        (
            student.is_program and (student.train is not None or distill is not None),
            "student.model: a .pt2 program cannot be trained; give FILE.py:factory, or leave out "
            "teacher, distill and train to export it as it is",
        ),
        (
            student.is_program and recipe.prune is not None,
            "prune: a .pt2 program cannot be cut; give FILE.py:factory and its weights",
        ),
        (
            any(t.is_program and t.train is not None for t in teachers),
            "teacher.train: a .pt2 program cannot be trained; leave `train` out",
        ),
        (
            any(n.is_program and n.weights is not None for n in networks),
            "weights: a .pt2 file holds its own weights; leave `weights` out",
        ),
        (
            any(n.is_hf and n.weights is not None for n in networks),
            "weights: an hf: folder holds its own weights; leave `weights` out",
        ),
        (
            any(not folder.names_its_classes for folder in folders) and recipe.data.labels is None,
            "data.labels: the hf: folder calls its classes LABEL_0, LABEL_1, …, so nothing says "
            "which is which; list the names in its order, or set `head: new` and train it",
        ),
        (
            any(n.head == "new" and n not in given and n.init != "scratch" for n in networks),
            "head: `new` replaces the classifier of given weights, and none are given",
        ),
        (
            any(n.head == "new" and not n.train and not (n is student and distill) for n in given),
            "head: a new classifier must be trained; add a `train` section beside it",
        ),
    ]


def _distill_conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    spec, teachers = recipe.distill, recipe.teachers
    if spec is None:
        return [
            (
                recipe.data.unlabelled is not None,
                "data.unlabelled: only a teacher can label these images; add a `teacher:` or "
                "`distill:` section, or leave them out",
            )
        ]
    # a term of weight 0 is none, and `quality` compares features too
    plan = choose(spec, is_text=recipe.is_text)
    terms = plan.objectives
    features = [term.name for term in terms if isinstance(term, FeatureSpec)]
    soft = [term.name for term in terms if isinstance(term, SoftSpec)]
    tokens = [term.name for term in terms if isinstance(term, TokenSpec)]
    mixes = bool(spec.augment.mixup or spec.augment.cutmix)
    is_self_taught = spec.target is not None and spec.target not in TAUGHT
    return [
        (
            not teachers and not is_self_taught and spec.generations == 1,
            "distill: there is no teacher to distil from; add a `teacher:` section, let the "
            "student teach itself (`target: ema`, `exits` or `peers`, or `generations: 2`), or "
            "use `student.train` to train from labels alone",
        ),
        (
            spec.target == "joint" and len(teachers) != 1,
            f"distill.target: joint trains one teacher with the student, got {len(teachers)}",
        ),
        (
            bool(teachers) and spec.target in ("ema", "exits", "peers"),
            f"distill.target: with {spec.target} the student is its own teacher; leave out "
            "`teacher:`, or use `target: live` or `stored`",
        ),
        (
            spec.target == "joint" and any(t.is_program or t.train for t in teachers),
            "teacher: with `target: joint` it is trained together with the student; leave out "
            "`train`, and give a network rather than a .pt2 program",
        ),
        (
            spec.target == "joint" and any(t.min_accuracy is not None for t in teachers),
            "teacher.min_accuracy: with `target: joint` it teaches while it learns, and is never "
            "measured before; leave it out",
        ),
        (
            is_self_taught and spec.generations > 1,
            f"distill.generations: a generation is taught by the one before, not by {spec.target}",
        ),
        (
            bool(features) and plan.target != "live",
            f"distill.objectives: {', '.join(features)} compares layers, which only a live teacher "
            f"shows, not `target: {plan.target}`; use `target: live`",
        ),
        (
            bool(features) and any(t.is_program for t in teachers),
            f"distill.objectives: {', '.join(features)} needs the teacher's layers, and a .pt2 "
            "program shows none; give FILE.py:factory, or use objectives over logits",
        ),
        (
            any(term.of > max(1, len(teachers)) for term in terms if isinstance(term, FeatureSpec)),
            f"distill.objectives: `of` names a teacher that is not there ({len(teachers)} given)",
        ),
        (
            spec.generations > 1 and any(t.of > 1 for t in terms if isinstance(t, FeatureSpec)),
            "distill.objectives: `of` names one of several teachers, and from the second of "
            f"{spec.generations} generations on there is one, the generation before; leave it out",
        ),
        (
            is_self_taught and not {"hard", "kd"} <= {term.name for term in terms},
            f"distill.objectives: `target: {spec.target}` needs `hard` and `kd`: without labels "
            "nobody would know an answer, without kd nobody would pass it on",
        ),
        (
            isinstance(spec.combine, tuple) and len(spec.combine) != len(teachers),
            f"distill.combine: expected a weight for each of {len(teachers)} teachers, got "
            f"{len(spec.combine) if isinstance(spec.combine, tuple) else 0}",
        ),
        (
            recipe.data.unlabelled is not None and is_self_taught,
            f"data.unlabelled: `target: {spec.target}` learns its answers from labels, which these "
            "images do not have; give a teacher",
        ),
        (
            recipe.data.unlabelled is not None and not ({"kd", "dist"} & set(soft) or tokens),
            "data.unlabelled: no objective can use images without labels; add `kd` or `dist`",
        ),
        (
            "dkd" in soft and (recipe.data.unlabelled is not None or mixes),
            "distill.objectives: dkd needs one true class for each image, which unlabelled and "
            "mixed images do not have; use kd",
        ),
        (
            spec.confidence_floor is not None and recipe.data.unlabelled is None,
            "distill.confidence_floor: it chooses among unlabelled images, and there are none; "
            "add `data.unlabelled`",
        ),
        (
            spec.confidence_floor is not None and plan.target == "live",
            "distill.confidence_floor: it is measured on stored labels; use `target: stored`",
        ),
    ]


def _gate_conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    gate = recipe.gate
    others = [] if recipe.profile is None else [d for d in recipe.profile.devices if d != LOCAL]
    measured = [] if recipe.profile is None else [LOCAL, *others]
    return [
        (
            gate.max_quantization_drop_points is not None and recipe.quantize is None,
            "gate.max_quantization_drop_points: nothing is quantized, so it would never be "
            "measured; add a `quantize:` section or remove the limit",
        ),
        (
            gate.min_int8_share is not None and recipe.quantize is None,
            "gate.min_int8_share: nothing is quantized, so the share is 0; add a `quantize:` "
            "section or remove the limit",
        ),
        *(
            (
                getattr(gate, limit) is not None
                and recipe.profile is None
                and gate.latency == "required",
                f"gate.{limit}: `profile` is null, so latency would never be measured; remove "
                "`profile: null` or the limit, or say `latency: not-here`",
            )
            for limit in ("min_speedup", "max_p90_ms", "max_peak_rss_bytes")
        ),
        *(
            (
                device not in measured and gate.latency == "required",
                f"gate.devices.{device}: would never be measured; measured on: "
                f"{', '.join(measured) or 'no device (`profile` is null)'}",
            )
            for device in gate.devices
        ),
        (
            gate.baseline is not None,
            "gate.baseline: a run has no earlier release to compare with; write the section into a "
            "policy file: compress gate DIR --policy FILE --baseline OLD_DIR",
        ),
        (
            gate.min_cpu_agreement is not None and not others,
            "gate.min_cpu_agreement: this run sees no other CPU; name one in `profile.devices`",
        ),
    ]


def _is_fully_given(preprocess: PreprocessSpec | None) -> bool:
    return preprocess is not None and preprocess.mean is not None and preprocess.std is not None
