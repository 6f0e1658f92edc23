"""Makes what the first start of a training would make otherwise. Called by the preparation commands when all else is done."""

from dataclasses import replace
from pathlib import Path

from datasets.lists import read_training_list
from datasets.prepare.ownership import SPLITS
from utils.errors import UserError
from utils.settings.config import load_config
from utils.settings.options import Step1Config

SIDE = 128  # of pictures without a GPU, pixels


def store_arrays(root: str | Path, dataset: str) -> None:
    """Store the arrays of `configs/{dataset}/step1.yaml` unless they are there. Where that is impossible, the reason is printed: why
    they cannot be written, which stops no training, or what is wrong with the data, which will.

    Without a GPU it is `configs/{dataset}_cpu/step1.yaml` where there is one, and nothing for pictures that only a GPU would train on.
    """
    import torch  # here alone, since every process that prepares objects imports this module

    from datasets.kinds import KINDS
    from datasets.samples import list_options
    from datasets.stored import FOLDER, store_array

    gpu = torch.cuda.is_available()
    names = [dataset] if gpu else [f"{dataset}_cpu", dataset]
    config = next((path for name in names if (path := Path("configs") / name / "step1.yaml").is_file()), None)
    if config is None:
        return
    try:
        data = replace(load_config(Step1Config, str(config)).data, root=str(root))
        if data.image_resize > SIDE and not gpu:
            return
        lists = [read_training_list(**list_options(data, name, split)) for name in data.modalities for split in SPLITS]
        failure = next((found for rows in lists if (found := store_array(rows, KINDS[data.kind_of(rows.modality)], data))), None)
    except UserError as error:
        print(f"no arrays for {config}: {error}")
        return
    print(f"no arrays for {config} yet, training will make them: {failure}" if failure else f"arrays for {config} in {root}/{FOLDER}")
