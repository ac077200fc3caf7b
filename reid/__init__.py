"""Person re-identification: the same result on any number of ranks, continued after any interruption.

The map, in reading order. Mathematics are pure functions on tensors and arrays that know no rank, settings or logger;
assembly builds, gathers and wires.

    the spine
    errors.py                   errors written for the user
    world.py                    what the launcher told this process about ranks
    environment_file.py         variables from .env
    config.py                   the yacs tree: names, defaults, units, checks
    combinations.py             which losses the settings choose, and which settings do not fit
    checks.py                   from a file's or command line's words to plain values
    data_settings.py            the settings that name benchmarks
    commands.py                 what each command takes besides settings
    launcher.py                 from the command line to a running story
    sweeps.py                   searches for settings, by W&B
    logs.py                     where lines go, and what happens where they cannot
    preemption.py               signals that ask a run to stop
    distributed.py              everything that knows there is more than one process
    wrapping.py                 precision and wrapping, by accelerate
    sync_batchnorm.py           BatchNorm over the global batch
    start.py                    what is found out before a run builds anything
    run.py                      the stories: train, evaluate
    engine.py                   what happens to one batch
    accumulation.py             the gradient of a global batch, one micro-batch at a time
    preflight.py                the check story: what a training would find, problems first
    link_speed.py               how fast collectives are between ranks and nodes
    trial_steps.py              the first steps of a training, timed
    handlers/records.py         what there is to write down, and the events that say so
    handlers/side_effects.py    guard around pictures, W&B and TensorBoard
    handlers/schedule.py        learning rate, sampler's place, when to evaluate
    handlers/meters.py          means over steps, equal on all ranks; the non-finite stop
    handlers/guards.py          the first batch is what was planned
    handlers/console.py         lines, progress bar, metrics.jsonl, result.json
    handlers/checkpoint.py      last_*.pt and best_*.pt; resume
    handlers/interruption.py    saving by the clock and because of a signal, at an agreed step
    handlers/watchdog.py        the end of a run in which a rank hangs
    handlers/tensorboard.py     TensorBoard
    handlers/pictures.py        the first batch, ranked queries and CMC curves as PNG files
    handlers/tracking.py        what a run records in Weights & Biases
    handlers/artifacts.py       data sets, checkpoints, images and tables at W&B
    handlers/wandb_session.py   where W&B records, and what happens where it fails
    handlers/wandb_jobs.py      queue of upload tasks, which wait for the server
    handlers/wandb_pieces.py    run segments on disk, and which of them W&B lacks
    handlers/wandb_process.py   the process of W&B, which must not outlive the training
    run_directory.py            the files of a run
    ownership.py                which start of a training may write them
    checkpoint_files.py         files that are whole or absent, written in the background

    the use of a trained model
    weight_file.py              the file that TEST.WEIGHT names, on the disk or at W&B
    trained.py                  the model in TEST.WEIGHT
    recorded.py                 the settings that a checkpoint or a gallery was made with
    embedding.py                the story of a folder of images that becomes a gallery
    gallery.py                  its files
    search.py                   the story of images that are looked for in it
    nearest.py                  exact nearest neighbours (mathematics)
    export.py                   the story of a model that leaves for other programs
    export_checks.py            whether it still computes the same
    safetensors_files.py        checkpoints that cannot run code
    whole_files.py              files that appear whole

    the parts
    data/names.py               what a benchmark may be called, and in which forms it comes
    data/benchmarks.py          name -> train, query, gallery
    data/splits.py              what these are, and what all readers share
    data/folders.py             Market-1501, DukeMTMC-reID, Occluded-Duke, VeRi-776
    data/lists.py               MSMT17, VehicleID
    data/cuhk03.py              CUHK03, from its .mat file or extracted
    data/tables.py              any CSV or Parquet table
    data/sources.py             where each comes from, how it lies on disk, its documented numbers
    data/synthetic.py           a generated benchmark of people in the Market-1501 layout
    data/people.py              how its people look
    data/photographs.py         how its cameras see them
    data/store.py               images decoded and resized once, memory-mapped
    data/large_files.py         large files that appear whole, and copies of them
    data/randomness.py          random numbers as a pure function of integers
    data/samplers.py            the global batch of (seed, epoch, step), and this rank's part
    data/augment.py             whole uint8 batches to normalised float batches on the device
    data/sets.py                the benchmarks that the settings name, several training sets as one (assembly)
    data/workers.py             batches from loader processes, and what is said where one is lost (assembly)
    data/loaders.py             from settings and folders to this rank's batches (assembly)
    data_check.py               what is wrong with the benchmarks on disk
    backbones.py                trunks, a plain dict by name
    timm_models.py              any other trunk that timm has
    model.py                    backbone, pooling, BNNeck, classifier, centers
    layouts.py                  what the names in a file of weights say of its model (mathematics)
    imagenet.py                 where ImageNet weights lie or come from
    weights.py                  weights from files, with a report
    conversion.py               the weights of whole pickled models (launch/convert.py)
    losses.py                   identity, batch-hard triplet, center (mathematics)
    criterion.py                which losses, over the global batch (assembly)
    optim.py                    parameter groups, optimiser, learning rate by the epoch
    metrics.py                  CMC, mAP, mINP (mathematics)
    ranking.py                  the positions of the matches, by counting
    verification.py             TPR at FPR over all pairs
    single_shot.py              CUHK03's protocol of one gallery image of each identity
    per_query.py                the scores of every query as rows, of every camera as a table
    neighbours.py               exact nearest neighbours among N images (mathematics)
    reranking.py                k-reciprocal re-ranking, sparse (mathematics)
    examples.py                 which queries to look at, and what they find (mathematics)
    pictures.py                 batches, rankings and CMC curves drawn (mathematics)
    evaluation.py               embeddings of all ranks to scores (assembly)
    summarize.py                mean and spread of several runs

Letters in shape comments: B batch, C training identities (or channels), D feature, G gallery, H height, K images per
identity, N data set, P identities in a batch, Q queries, T batches in an epoch, W width (or the number of ranks).
"""
