"""Settings of the run and the MODEL section."""

from __future__ import annotations

from reid.config.validators import Setting, flag, integer, one_of, text

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_SENETS = ("se_resnet50", "se_resnet101", "se_resnet152", "se_resnext50", "se_resnext101", "senet154")
_IBN_RESNETS = ("resnet50_ibn_a", "resnet101_ibn_a")

RUN = {
    "SEED": Setting(
        default=0,
        validate=integer(0, 2**32 - 1),
        doc="Seed of every random number of the run: initial weights, batches, augmentations. The same seed gives the "
        "same batches on any number of processes; use several seeds to measure the spread of a result.",
    ),
    "OUTPUT_DIR": Setting(
        default="",
        validate=text(),
        doc="Folder of the run: settings, logs, checkpoints, results. A training that is started again with the same "
        "folder resumes there. Empty: runs/ and the name of the configuration file, or runs/default without a "
        "file.",
    ),
}

MODEL = {
    "MODEL.NAME": Setting(
        default="resnet50",
        validate=one_of(*RESNETS, *_SENETS, *_IBN_RESNETS, or_prefix="timm/"),
        doc="Backbone: one of reid-strong-baseline's twelve, resnet101_ibn_a, or any model of timm, as "
        "timm/vit_small_patch16_224. With the published recipe resnet50_ibn_a and se_resnext50 give about 2 "
        "points more mAP than resnet50 on Market-1501.",
    ),
    "MODEL.DEVICE": Setting(
        default="auto",
        validate=one_of("auto", "cuda", "cpu"),
        doc="Kind of device. auto: GPUs where there are any, else the CPU. With cuda the run ends with an error where "
        "there is no GPU; which GPUs are used is decided by torchrun, Slurm or CUDA_VISIBLE_DEVICES.",
    ),
    "MODEL.LAST_STRIDE": Setting(
        default=1,
        validate=integer(1, 2),
        doc="Stride of the last residual stage. 1 doubles the height and width of the last feature map (16 x 8 in "
        "place of 8 x 4 for 256 x 128 images), which costs time and memory and gave 1.4 points of mAP on "
        "Market-1501 in the published ablation. For timm/NAME, 1 is timm's output_stride 16; models that do not "
        "have it ignore the setting, which is logged.",
    ),
    "MODEL.PRETRAIN_PATH": Setting(
        default="",
        validate=text(),
        doc="File of the weights to start from, for MODEL.PRETRAIN_CHOICE imagenet, self and finetune. Empty with "
        "imagenet: this machine's copy or a download. A path that does not exist but ends in the file name of the "
        "backbone's own ImageNet weights, as in the files of reid-strong-baseline, also means that copy.",
    ),
    "MODEL.PRETRAIN_CHOICE": Setting(
        default="imagenet",
        validate=one_of("imagenet", "self", "finetune", "none"),
        doc="What the weights start from. imagenet: backbone weights only; self: a complete model of the same "
        "identities, where a NAME_model_N.pth of reid-strong-baseline continues after epoch N with a new "
        "optimizer; finetune: a complete model except for its classifier and centers, for other identities; none: "
        "random weights. A checkpoint in OUTPUT_DIR takes precedence over all of them.",
    ),
    "MODEL.NECK": Setting(
        default="bnneck",
        validate=one_of("bnneck", "no"),
        doc="Neck of the model: bnneck puts a BatchNorm between the feature, which the metric losses see, and the "
        "classifier. It gave 4.0 points of mAP on Market-1501 in the published ablation.",
    ),
    "MODEL.STEM_RELU": Setting(
        default=False,
        validate=flag,
        doc="ReLU after the first BatchNorm of a plain ResNet (resnet18 to resnet152). reid-strong-baseline has none, "
        "so no is needed for its published weights; use yes for new trainings, as configs/*.yml do. All other "
        "backbones always have their own activation: there the value is yes.",
    ),
    "MODEL.IF_WITH_CENTER": Setting(
        default=False,
        validate=flag,
        doc="Adds the center loss and an identity loss, whatever DATALOADER.SAMPLER is; needs MODEL.METRIC_LOSS_TYPE "
        "center or triplet_center. It gave 0.2 points of mAP on Market-1501 in the published ablation.",
    ),
    "MODEL.FREEZE_BN": Setting(
        default=False,
        validate=flag,
        doc="Freezes the BatchNorm layers of the backbone: running statistics, scale and shift stay as loaded. For "
        "fine-tuning with small batches.",
    ),
    "MODEL.COMPILE": Setting(
        default=False,
        validate=flag,
        doc="Compiles the model of the training step by torch.compile. The first step takes about a minute longer; "
        "worth it for long runs on GPUs.",
    ),
    "MODEL.CHANNELS_LAST": Setting(
        default="auto",
        validate=one_of("auto", "yes", "no"),
        doc="Stores images and weights with the channels innermost, which makes convolutions on GPUs faster. auto: on "
        "GPUs only, since BatchNorm on a CPU is less exact with it.",
    ),
    "MODEL.METRIC_LOSS_TYPE": Setting(
        default="triplet",
        validate=one_of("triplet", "center", "triplet_center"),
        doc="Metric loss: triplet with MODEL.IF_WITH_CENTER no, center or triplet_center with yes. It has no effect "
        "with DATALOADER.SAMPLER softmax and MODEL.IF_WITH_CENTER no, where there is no metric loss.",
    ),
    "MODEL.IF_LABELSMOOTH": Setting(
        default=True,
        validate=flag,
        doc="Label smoothing of the identity loss, with epsilon 0.1 as in reid-strong-baseline. See "
        "MODEL.SMOOTH_SOFTMAX for its exception.",
    ),
    "MODEL.SMOOTH_SOFTMAX": Setting(
        default=False,
        validate=flag,
        doc="Applies label smoothing also with DATALOADER.SAMPLER softmax and no center loss, where "
        "reid-strong-baseline silently omits it. Use yes for new trainings; no reproduces published figures.",
    ),
}
