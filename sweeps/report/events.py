"""Writes the report's figures and the columns of the HPARAMS tab for TensorBoard."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path

from sweeps.report.collect import FOLDER
from sweeps.report.drawing import Drawing
from sweeps.report.settings import Settings, is_number

_SUFFIX = ".report"


def write_events(folder: Path, settings: Settings, drawings: Sequence[Drawing]) -> None:
    """Replace the report's own event file.

    Without it, TensorBoard lists all keys of all command lines and all metrics. With it, the
    HPARAMS tab has the varied keys, the seed and the metrics of the report's table. The folder has
    the drawings' PNGs; TensorBoard shows its name.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for old in folder.glob(f"events.out.tfevents.*{_SUFFIX}"):
        old.unlink()
    numbers = {
        key: all(is_number(setting.values.get(key)) for setting in settings.all)
        for key in settings.varied
        if key != FOLDER
    }
    keys = [*numbers, *(["seed"] if "seed" not in numbers else [])]
    kinds = {True: api_pb2.DATA_TYPE_FLOAT64, False: api_pb2.DATA_TYPE_STRING}
    columns = [api_pb2.HParamInfo(name=key, type=kinds[numbers.get(key, True)]) for key in keys]
    metrics = []
    for metric in settings.columns:
        tag = api_pb2.MetricName(tag=_TAGS.get(metric.tag, metric.tag))
        metrics.append(api_pb2.MetricInfo(name=tag, display_name=f"{metric.name} ({metric.unit})"))
    content = plugin_data_pb2.HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        experiment=api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics),
    )
    about = metadata.create_summary_metadata(content)
    values = [Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about)]
    for drawing in drawings:
        if drawing.chart is not None:
            data = (folder / f"{drawing.name}.png").read_bytes()
            # A PNG's header names its size at bytes 16 to 23.
            width, height = struct.unpack(">II", data[16:24])
            image = Summary.Image(width=width, height=height, encoded_image_string=data)
            values.append(Summary.Value(tag=f"report/{drawing.title}", image=image))
    writer = EventFileWriter(str(folder), filename_suffix=_SUFFIX)
    for value in values:
        writer.add_event(Event(wall_time=time.time(), summary=Summary(value=[value])))
    writer.close()


# Short names of a summary, and the tags under which these values are logged.
_TAGS = {"flops": "progress/flops", "seconds": "progress/seconds"}
