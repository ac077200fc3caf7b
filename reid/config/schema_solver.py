"""Settings of the SOLVER section."""

from __future__ import annotations

from reid.config.validators import Setting, flag, increasing, integer, one_of, optional, real, sequence

_EPOCHS = increasing(sequence(integer(0), "whole numbers >= 0"))

SOLVER = {
    "SOLVER.OPTIMIZER_NAME": Setting(
        default="Adam",
        validate=one_of("Adam", "AdamW", "SGD", "NAdam", "RAdam", "RMSprop", "Adagrad"),
        doc="Class of torch.optim, with its default options except for the settings below. The published recipe was "
        "tuned for Adam; others need another SOLVER.BASE_LR.",
    ),
    "SOLVER.FUSED": Setting(
        default="auto",
        validate=one_of("auto", "yes", "no"),
        doc="Computes the step of the optimizer in one kernel. auto: where torch has one, which is for Adam, AdamW "
        "and, except with SOLVER.PRECISION fp16, SGD.",
    ),
    "SOLVER.MAX_EPOCHS": Setting(
        default=120,
        validate=integer(1),
        unit="epochs",
        doc="Epochs to train. Raise it to train a finished run for longer.",
    ),
    "SOLVER.BASE_LR": Setting(
        default=3.5e-4,
        validate=real(above=0),
        doc="Learning rate after warm-up and before the first of SOLVER.STEPS. It belongs to SOLVER.IMS_PER_BATCH: "
        "scale it when that changes, not when the number of processes does.",
    ),
    "SOLVER.BIAS_LR_FACTOR": Setting(
        default=1.0,
        validate=real(minimum=0),
        doc="Learning rate of biases, BatchNorm's included, as a factor of the rate of other weights.",
    ),
    "SOLVER.MOMENTUM": Setting(
        default=0.9,
        validate=real(minimum=0, maximum=1),
        doc="Momentum of SGD; other optimizers ignore it.",
    ),
    "SOLVER.MARGIN": Setting(
        default=0.3,
        validate=optional(real(minimum=0)),
        unit="Euclidean distance",
        doc="Margin of the triplet loss, in Euclidean distance between features before the neck. None: soft margin, "
        "log(1 + exp(x)) in place of max(0, margin + x).",
    ),
    "SOLVER.CENTER_LR": Setting(
        default=0.5,
        validate=real(above=0),
        doc="Learning rate of the centers, which move by their own SGD; neither warm-up nor SOLVER.STEPS change it.",
    ),
    "SOLVER.CENTER_LOSS_WEIGHT": Setting(
        default=0.0005,
        validate=real(above=0),
        doc="Factor of the center loss in the sum of losses; it does not slow the centers down.",
    ),
    "SOLVER.WEIGHT_DECAY": Setting(
        default=5e-4,
        validate=real(minimum=0),
        doc="Weight decay of everything except biases. With Adam and SGD it is added to the gradient (L2), with AdamW "
        "it is decoupled.",
    ),
    "SOLVER.WEIGHT_DECAY_BIAS": Setting(
        default=5e-4,
        validate=real(minimum=0),
        doc="Weight decay of biases, BatchNorm's included.",
    ),
    "SOLVER.GAMMA": Setting(
        default=0.1,
        validate=real(above=0),
        doc="Factor that the learning rate is multiplied by at each of SOLVER.STEPS.",
    ),
    "SOLVER.STEPS": Setting(
        default=(40, 70),
        validate=_EPOCHS,
        unit="epochs",
        doc="Epochs after which the learning rate is multiplied by SOLVER.GAMMA: with 40, epoch 40 still has the "
        "higher rate and epoch 41 the lower one, as in the published runs. An empty list keeps the rate constant.",
    ),
    "SOLVER.WARMUP_FACTOR": Setting(
        default=0.01,
        validate=real(minimum=0, maximum=1),
        doc="Learning rate at the start of warm-up, as a factor of SOLVER.BASE_LR.",
    ),
    "SOLVER.WARMUP_ITERS": Setting(
        default=10,
        validate=integer(0),
        unit="epochs",
        doc="Length of the warm-up in epochs, despite the name, which is reid-strong-baseline's. 0: no warm-up.",
    ),
    "SOLVER.WARMUP_METHOD": Setting(
        default="linear",
        validate=one_of("linear", "constant"),
        doc="Form of the warm-up. linear: the rate rises evenly to SOLVER.BASE_LR; constant: it stays at "
        "SOLVER.WARMUP_FACTOR until warm-up ends.",
    ),
    "SOLVER.CHECKPOINT_PERIOD": Setting(
        default=1,
        validate=integer(1),
        unit="epochs",
        doc="Epochs between checkpoints to resume from. The two newest are kept, and the best one by mAP.",
    ),
    "SOLVER.CHECKPOINT_EVERY_MINUTES": Setting(
        default=10.0,
        validate=real(minimum=0),
        unit="minutes",
        doc="Minutes between checkpoints within an epoch, in addition to those at the end of epochs: what a kill "
        "without warning costs at most. 0: none within an epoch.",
    ),
    "SOLVER.LOG_PERIOD": Setting(
        default=20,
        validate=integer(1),
        unit="steps",
        doc="Steps between lines of the log and rows of metrics.",
    ),
    "SOLVER.EVAL_PERIOD": Setting(
        default=40,
        validate=integer(1),
        unit="epochs",
        doc="Epochs between evaluations. The last epoch is always evaluated.",
    ),
    "SOLVER.IMS_PER_BATCH": Setting(
        default=64,
        validate=integer(1),
        unit="images",
        doc="Images in the global batch, over all processes; it stays as it is when their number changes. With P x K "
        "batches it must be a multiple of DATALOADER.NUM_INSTANCE, and its identities a multiple of the number of "
        "processes.",
    ),
    "SOLVER.ACCUMULATE": Setting(
        default=1,
        validate=integer(1),
        unit="micro-batches",
        doc="Micro-batches that the global batch is computed in, for batches that do not fit into memory; each image "
        "then costs a second forward pass. Losses are still those of the global batch, exactly. BatchNorm "
        "normalizes over one micro-batch of all ranks: SOLVER.IMS_PER_BATCH divided by this number.",
    ),
    "SOLVER.CLIP_GRAD_NORM": Setting(
        default=0.0,
        validate=real(minimum=0),
        doc="Largest 2-norm of all gradients together; larger ones are scaled down. 0: no clipping.",
    ),
    "SOLVER.SHARDING": Setting(
        default="none",
        validate=one_of("none", "fsdp"),
        doc="Distribution of the model. fsdp: every rank keeps only a share of weights, gradients and optimizer state "
        "(FSDP2), for models that do not fit into one GPU. It needs several GPUs; checkpoints stay "
        "interchangeable.",
    ),
    "SOLVER.PRECISION": Setting(
        default="fp32",
        validate=one_of("fp32", "fp64", "bf16", "fp16"),
        doc="Number type that the model computes in; bf16 and fp16 are mixed precision, faster on GPUs and not exact. "
        "fp16 needs a GPU. fp64 is for tests of exactness.",
    ),
    "SOLVER.SYNC_BN": Setting(
        default=True,
        validate=flag,
        doc="BatchNorm over the global batch. With no, every rank normalizes over its own images, and several "
        "processes train another model than one process does: with reid-strong-baseline that gave 82.8 % mAP in "
        "place of about 86 % on Market-1501.",
    ),
    "SOLVER.TIMEOUT_MINUTES": Setting(
        default=30.0,
        validate=real(minimum=0.01, maximum=10080),
        unit="minutes",
        doc="Minutes without a training step, or a batch of an evaluation, after which all ranks end; the log then "
        "names the rank that hangs. Raise it where a single step or the re-ranking takes longer.",
    ),
}
