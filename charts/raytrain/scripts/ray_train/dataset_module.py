r"""The data set of fine_tune.py. Replace this file for rows that no template fits.

It holds HFDatasetConfig, the class of Config.hf_dataset_config. A function `convert` in it makes a row into text
in place of the templates:

    def convert(row):
        return {"input": f"{row['context']}\n{row['question']}\n", "output": row["answers"][0]}

or into a conversation, `{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}`.
"""

from tunesmith.config import HFDatasetConfig

__all__ = ["HFDatasetConfig"]
