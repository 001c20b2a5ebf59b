"""What is asked of the library `datasets`, and its errors in sentences."""

import errno
import sys

from ulysses_plus.errors import UserError, chain_of, one_line

# Arguments of load_dataset that change how rows come here, not which.
NOT_CONTENT = (
    "cache_dir", "download_config", "download_mode", "keep_in_memory", "num_proc", "save_infos", "storage_options", "token", "verification_mode",
    "writer_batch_size",
)


def content_of(kwargs):
    """Those of the arguments of load_dataset that change the rows."""
    return {key: value for key, value in kwargs.items() if key not in NOT_CONTENT}


def check_arguments(kwargs, where):
    """Raises UserError for arguments of load_dataset that are not taken here."""
    if kwargs.get("trust_remote_code"):
        raise UserError(f"{where}: trust_remote_code: code of a data set is never run; give its data as files")
    if kwargs.get("streaming"):
        raise UserError(f"{where}: streaming: samples are counted and drawn before they are read: remove it")


def as_written(path, kwargs):
    """Returns the arguments with which cells of CSV are text: 007 is no number, NA and nothing are no float.

    path   a file that has the columns
    """
    import datasets
    import pandas

    if "features" in kwargs:
        return kwargs
    said = {key: value for key, value in kwargs.items() if key in ("sep", "delimiter", "header", "names", "encoding", "quotechar", "skiprows", "skipinitialspace", "escapechar", "comment")}
    try:
        columns = pandas.read_csv(path, nrows=0, **said).columns
    except Exception:    # who reads it says what is wrong
        return kwargs
    return {"keep_default_na": False, **kwargs, "features": datasets.Features({str(column): datasets.Value("string") for column in columns})}


def load_local(builder, data_files, split, scratch, where, name, kwargs, csv=None):
    """Returns the rows of local files by a builder's name, or of a folder; [] if there are none.

    data_files   {split: paths}, or None for a folder
    csv          one of the files where all are CSV
    scratch      the library keeps what it reads here: its own cache knows files by name and time, not by content
    """
    import datasets

    _quiet(datasets)
    more = {} if data_files is None else {"data_files": data_files}
    if csv is not None:
        kwargs = as_written(csv, kwargs)
    try:
        return datasets.load_dataset(builder, split=split, **{**kwargs, **more, "cache_dir": scratch})
    except MemoryError:
        raise
    except Exception as error:
        chain = chain_of(error)
        full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
        if full is not None:
            raise full from error
        if any("corresponds to no data" in str(e) or type(e).__name__ in ("EmptyDataError", "SchemaInferenceError") for e in chain):
            return []
        if any("BatchSize must be greater than 0" in str(e) for e in chain):
            raise UserError(f"{where}: {name}: expected rows in each parquet file, found one without: remove it") from error
        generation = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
        raise UserError(f"{where}: {name}: {one_line(error.__cause__ if generation else error)}") from error


def is_parquet_without_rows(path):
    """Whether a file is parquet and has no rows, which the library cannot read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    except (pyarrow.ArrowException, OSError):
        return False    # who reads it says what is wrong


def files_of(folder, scratch, where, name, kwargs):
    """{split: paths} of a folder's data files, as the library sorts them; `folder` may be a builder's name if kwargs have data_dir."""
    import datasets

    _quiet(datasets)
    try:
        builder = datasets.load_dataset_builder(folder, **{**kwargs, "cache_dir": scratch})
    except datasets.data_files.EmptyDatasetError as error:
        raise UserError(f"{where}: {name}: expected a folder of data files, found none in it: correct the path") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {name}: {one_line(error)}") from error
    return {str(split): [str(path) for path in paths] for split, paths in (builder.config.data_files or {}).items()}


def load_saved(folder, where, name):
    """Returns the rows of a folder that `save_to_disk` wrote of one split."""
    import datasets

    _quiet(datasets)
    try:
        return datasets.load_from_disk(folder)
    except Exception as error:
        raise UserError(f"{where}: {name}: expected a folder of save_to_disk, found {one_line(error)}") from error


def load_hub(name, split, where, kwargs):
    """Returns the rows of a data set of the hub, or of files at a URL. Raises UserError and NetworkError."""
    import datasets

    from ulysses_plus.fetch import sorted_by_who_must_act

    _quiet(datasets)
    try:
        return datasets.load_dataset(name, split=split, **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: {name}: {one_line(error)}") from error
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            raise UserError(f"{where}: {name}: {one_line(error.__cause__)}") from error
        told = sorted_by_who_must_act(error, name, "dataset")
        if told is error:
            raise
        raise type(told)(f"{where}: {told}") from error


def _quiet(datasets):
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    # Its errors come as exceptions, too.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
