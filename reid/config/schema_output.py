"""Settings of the TEST, LOG and WANDB sections."""

from __future__ import annotations

from reid.config.schema_data import benchmarks_or_none
from reid.config.validators import Setting, as_list, flag, integer, one_of, real, sequence, text

_RATES = sequence(real(above=0, below=1), "numbers between 0 and 1, as [0.0001,0.001,0.01]")
_REFUSED_BY_WANDB = "/\\#?%:"  # in names
_TAGS = as_list(sequence(text(shortest=1, longest=64), "a list of texts of 1 to 64 characters"))

TEST = {
    "TEST.DATASETS": Setting(
        default=(),
        validate=benchmarks_or_none,
        doc="Benchmarks to test on, in place of DATASETS.NAMES; the first one decides which checkpoint is the best. "
        "Use it to measure how well a model transfers. Empty: DATASETS.NAMES.",
    ),
    "TEST.IMS_PER_BATCH": Setting(
        default=128,
        validate=integer(1),
        unit="images",
        doc="Images that a rank embeds at once in an evaluation. Lower it where memory runs out; the result does not "
        "change.",
    ),
    "TEST.RE_RANKING": Setting(
        default=False,
        validate=flag,
        doc="k-reciprocal re-ranking (Zhong et al., CVPR 2017), in the evaluations of a training too. It raised mAP "
        "from 85.9 % to 94.2 % on Market-1501 in the published ablation; report it separately.",
    ),
    "TEST.RE_RANKING_K1": Setting(
        default=20,
        validate=integer(1),
        unit="images",
        doc="Nearest images of each image, besides itself, that must be mutual.",
    ),
    "TEST.RE_RANKING_K2": Setting(
        default=6,
        validate=integer(1),
        unit="images",
        doc="Nearest images, including the image itself, whose weights are averaged (local query expansion). 1: no "
        "averaging.",
    ),
    "TEST.RE_RANKING_LAMBDA": Setting(
        default=0.3,
        validate=real(minimum=0, maximum=1),
        doc="Share of the original distance in the result; the rest is the Jaccard distance. 1: no re-ranking.",
    ),
    "TEST.WEIGHT": Setting(
        default="",
        validate=text(),
        doc="Checkpoint to evaluate, embed with or export: a file, or wandb:ENTITY/PROJECT/NAME:ALIAS of an artifact "
        "at W&B. Training ignores it.",
    ),
    "TEST.NECK_FEAT": Setting(
        default="after",
        validate=one_of("after", "before"),
        doc="Embedding: the feature after or before the BNNeck. The published figures are after it, compared by "
        "cosine.",
    ),
    "TEST.FEAT_NORM": Setting(
        default=True,
        validate=flag,
        doc="Compares embeddings by cosine, that is, L2-normalized. With no, by Euclidean distance.",
    ),
    "TEST.FLIP": Setting(
        default=False,
        validate=flag,
        doc="Embedding: the mean of those of the image and of its mirror image. It takes twice the time and usually "
        "raises mAP slightly; the published figures are without it.",
    ),
    "TEST.FPR": Setting(
        default=(),
        validate=_RATES,
        doc="False positive rates at which the true positive rate over all pairs of query and gallery images is "
        "reported. Empty: none.",
    ),
    "TEST.SINGLE_GALLERY_SHOT": Setting(
        default="auto",
        validate=one_of("auto", "yes", "no"),
        doc="CMC over one random gallery image of each identity, drawn ten times for each query. auto: as the "
        "benchmark's protocol requires, which is yes for DATASETS.CUHK03.PROTOCOL classic.",
    ),
}

LOG = {
    "LOG.TENSORBOARD": Setting(
        default=False,
        validate=flag,
        doc="Writes train/* and val/* to TensorBoard files in OUTPUT_DIR/tensorboard too. Needs the extra: uv sync "
        "--extra tensorboard.",
    ),
}

WANDB = {
    "WANDB.ENABLE": Setting(
        default=True,
        validate=flag,
        doc="Records the run with Weights & Biases, from rank 0. Without a key or a network it is recorded offline; "
        "no turns it off entirely.",
    ),
    "WANDB.PROJECT": Setting(
        default="reid-strong-baseline",
        validate=text(longest=128, without=_REFUSED_BY_WANDB),
        doc="W&B project that the run belongs to.",
    ),
    "WANDB.ENTITY": Setting(
        default="",
        validate=text(),
        doc="W&B user or team that owns the project. Empty: the default entity of the key.",
    ),
    "WANDB.NAME": Setting(
        default="",
        validate=text(),
        doc="Name of the run at W&B. Empty: W&B invents one.",
    ),
    "WANDB.TAGS": Setting(
        default=[],
        validate=_TAGS,
        doc="Tags of the run at W&B, to filter runs by.",
    ),
    "WANDB.SYNC_TENSORBOARD": Setting(
        default=False,
        validate=flag,
        doc="Lets W&B copy the TensorBoard files of the run; needs LOG.TENSORBOARD yes.",
    ),
    "WANDB.SAVE_CODE": Setting(
        default=False,
        validate=flag,
        doc="Lets W&B save a copy of the code.",
    ),
    "WANDB.MODE": Setting(
        default="",
        validate=one_of("", "online", "offline", "disabled"),
        doc="Mode of W&B. Empty: WANDB_MODE of the environment decides, else online where there is a key and offline "
        "where there is none. Use offline on compute nodes without a network.",
    ),
    "WANDB.GROUP": Setting(
        default="",
        validate=text(),
        doc="Group of runs that W&B shows together, such as the seeds of one experiment.",
    ),
    "WANDB.JOB_TYPE": Setting(
        default="train",
        validate=text(),
        doc="Kind of the run within its group. An evaluation by itself replaces train by eval.",
    ),
    "WANDB.NOTES": Setting(
        default="",
        validate=text(),
        doc="Free text about the run at W&B.",
    ),
    "WANDB.LOG_IMAGES": Setting(
        default=True,
        validate=flag,
        doc="Draws pictures into OUTPUT_DIR/pictures: a training batch, ranked queries, CMC curves. W&B gets them "
        "too, where it is enabled.",
    ),
    "WANDB.NUM_QUERIES": Setting(
        default=8,
        validate=integer(0),
        unit="queries",
        doc="Random queries to draw of each test set, and as many of the worst ones.",
    ),
    "WANDB.RUN_ID": Setting(
        default="",
        validate=text(longest=64, without=_REFUSED_BY_WANDB),
        doc="Id of the W&B run to resume. Empty: the run that OUTPUT_DIR belongs to, or a new one.",
    ),
    "WANDB.RESUME": Setting(
        default="allow",
        validate=one_of("allow", "must", "never"),
        doc="Use of an earlier W&B run. allow: resume the W&B run of OUTPUT_DIR where there is one, else start a new "
        "one; must: an error where there is none; never: every start is a new run.",
    ),
    "WANDB.LOG_CHECKPOINTS": Setting(
        default="best",
        validate=one_of("none", "best", "last", "best+last"),
        doc="Checkpoints to upload to W&B as artifacts. best: the weights of every new best one; last: the training "
        "state that a process ends with, which is three times as large and can be resumed from.",
    ),
    "WANDB.INIT_TIMEOUT": Setting(
        default=20.0,
        validate=real(minimum=0.1, maximum=3600),
        unit="seconds",
        doc="Seconds to wait for W&B's answer at the start; then WANDB.ON_FAILURE applies.",
    ),
    "WANDB.FINISH_TIMEOUT": Setting(
        default=60.0,
        validate=real(minimum=0.1, maximum=3600),
        unit="seconds",
        doc="Seconds to wait at the end for what is not uploaded yet. The remainder stays in OUTPUT_DIR and can be "
        "sent with wandb sync.",
    ),
    "WANDB.ON_FAILURE": Setting(
        default="offline",
        validate=one_of("offline", "disable", "raise"),
        doc="What happens where W&B cannot be reached. offline: record on the disk; disable: train without W&B; "
        "raise: end the run, at once if W&B cannot start, or after everything else is saved if something could "
        "not be sent.",
    ),
}
