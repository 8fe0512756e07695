"""Every kind of real object over the wire and through triage: kept byte by byte, and told apart by the right reason."""

from __future__ import annotations

import queue
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for
from made_instances import send_raw
from pynetdicom import AE, build_context, evt
from pynetdicom.presentation import AllStoragePresentationContexts
from test_header import part_10_files
from test_listener import Node

from node.images.elements import HeaderError
from node.intake.header import read_header
from node.methods.pneumonia.triage import triage
from node.text import UID

pytestmark = [
    pytest.mark.data,
    pytest.mark.filterwarnings("ignore"),
]

#: Path below the zoo (start of it) → what triage says of the series that the file ends in.
EXPECTED = {
    "icometrix+dicom2nifti/tests/data/failing/gantrytilting": "gantry tilt of 14 degrees",
    "icometrix+dicom2nifti/tests/data/failing/notavolume": "1 slice; at least 25 are needed",
    "icometrix+dicom2nifti/tests/data/failing/slicecount": "MR images, not CT",
    "icometrix+dicom2nifti/tests/data/failing/sliceincrement": "incomplete: gap at z = 33.1 mm",
    "icometrix+dicom2nifti/tests/data/failing/sliceorientation": "MR images, not CT",
    "icometrix+dicom2nifti/tests/data/generic/rgb": "secondary capture",
    "SaltyJoke+Image-Registration/data-sample/A098752/axial": "1 slice; at least 25 are needed",
    "SaltyJoke+Image-Registration/data-sample/A098752/coronal": "derived images",
    "SaltyJoke+Image-Registration/data-sample/A098752/sagittal": "derived images",
    "cornerstonejs+dicomParser/testImages/deflate/report_dfl": "structured report",
    "cornerstonejs+dicomParser/testImages/deflate/wave_dfl": "no CT images, but Hemodynamic Waveform",
    "cornerstonejs+dicomParser/testImages/encapsulated/multi-frame": r"derived images \(perfusion\)",
    "ivmartel+dwv/tests/data/osirix-toutatix": "body part HEART, not chest",
    "neurolabusc+dcm_qa_ct/In/Philips": "secondary capture",
    "openradx+adit/samples/dicoms/1001/20200705_182823_CT,SR/Topogramm": "localizer",
    "openradx+adit/samples/dicoms/1001/20200705_182823_CT,SR/FUJI": "structured report",
    "pydicom+pydicom/src/pydicom/data/test_files/dicomdirtests/77654033/CT2": "body part HEAD, not chest",
    "pydicom+pydicom/src/pydicom/data/test_files/dicomdirtests/98892001/CT2N": "localizer",
    "pydicom+pydicom/src/pydicom/data/test_files/rtplan.dcm": "no CT images, but RT Plan",
    "pydicom+pydicom-data/data_store/data/liver": "segmentation",
    "pydicom+pydicom-data/data_store/data/emri": "MR images, not CT",
    "pydicom+pydicom-data/data_store/data/parametric_map": "no CT images, but Parametric Map",
    "robyoung+dicom-test-files/data/WG04/RLE/CT2": r"slices are 10\.0 mm thick",
    "suyashkumar+dicom/testdata/2.dcm": "PET images, not CT",
    "themorlan+openREM/openrem/remapp/tests/test_files/CT-RDSR": "dose report",
    "themorlan+openREM/openrem/remapp/tests/test_files/NM-CT-RDSR": "dose report",
    "themorlan+openREM/openrem/remapp/tests/test_files/CT-ESR": "structured report",
    "themorlan+openREM/openrem/remapp/tests/test_files/CT-SC": "secondary capture",
    "QIICR+dcmqi/data/segmentations/23x38x3/multiframe": "3 slices; at least 25 are needed",
    "ImagingDataCommons+highdicom/data/test_files/dx_image": "no CT images, but Digital X-Ray",
    "ImagingDataCommons+highdicom/data/test_files/seg": "segmentation",
}

STORAGE = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
Sent = tuple[Path, bytes, str, str, str]


def batches(folder: Path) -> Iterator[list[Sent]]:
    """Files as (path, data set, SOP class, SOP instance, transfer syntax), as many as one association has contexts."""
    batch: list[Sent] = []
    for path, ds, raw, transfer_syntax in part_10_files(folder):
        if ds.get("SOPClassUID") and ds.get("SOPInstanceUID"):
            batch.append((path, raw, str(ds.SOPClassUID), str(ds.SOPInstanceUID), transfer_syntax))
            if len(batch) == 60:
                yield batch
                batch = []
    yield batch


def test_the_whole_zoo(tmp_path: Path, data_dir: Path) -> None:
    zoo = data_dir / "dicom-zoo"
    node, answers = Node(tmp_path), Counter[int]()
    series_of: dict[str, str] = {}
    try:
        for batch in batches(zoo):
            for (path, raw, sop_class, instance, transfer_syntax), status in zip(batch, send(node, batch), strict=True):
                name = str(path.relative_to(zoo))
                if status is None:
                    # No context: the transfer syntax or the SOP class is none that is kept.
                    assert sop_class not in STORAGE, name
                    continue
                answers[status] += 1
                try:
                    header = read_header(raw, transfer_syntax)
                except HeaderError:
                    assert status == 0xC000, name
                    continue
                if not UID.match(header.series_instance_uid):
                    assert status == 0xC000, name
                    continue
                assert status in (0x0000, 0xB000), name
                series_of[name] = header.series_instance_uid
                if status == 0x0000:
                    kept = node.kept(header.study_instance_uid, header.series_instance_uid)
                    assert kept[instance] == raw, name
        wait_for(lambda: node.assembly.open_series == 0, 20, "all series to close")
    finally:
        node.listener.stop()

    # One slice in many transfer syntaxes has one UID: the first is kept, the others are warned of.
    assert answers[0x0000] > 200
    assert answers[0xB000] > 10
    assert answers.keys() == {0x0000, 0xB000, 0xC000}
    verdicts = {closed.series_instance_uid: verdict for closed in node.closed for verdict in triage(closed)}
    assert verdicts.keys() == set(series_of.values())
    assert not any(verdict.analyse for verdict in verdicts.values())
    for start, reason in EXPECTED.items():
        found = {verdicts[series].reason for name, series in series_of.items() if name.startswith(start)}
        assert found, start
        assert all(re.match(f"not analysed: {reason}", one) for one in found), (start, found)


def send(node: Node, batch: list[Sent]) -> list[int | None]:
    """Statuses of the objects, sent over one association with a context for each; None where there is none."""
    ae = AE("ZOO")
    contexts = [build_context(sop_class, transfer_syntax) for _, _, sop_class, _, transfer_syntax in batch]
    association = ae.associate("127.0.0.1", node.listener.port, contexts=contexts, ae_title="LUNGNODE")
    assert association.is_established
    responses: queue.Queue[int] = queue.Queue()
    association.bind(evt.EVT_DIMSE_RECV, lambda event: responses.put(event.message.command_set.Status))
    accepted = {context.context_id for context in association.accepted_contexts}
    statuses: list[int | None] = []
    for n, (_, raw, sop_class, instance, _) in enumerate(batch):
        context_id = 2 * n + 1
        if context_id not in accepted:
            statuses.append(None)
            continue
        request = {"AffectedSOPClassUID": sop_class, "AffectedSOPInstanceUID": instance}
        send_raw(association, raw, request, context_id)
        statuses.append(responses.get(timeout=10))
    association.release()
    return statuses
