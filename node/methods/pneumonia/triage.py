"""Is a closed series ours? Axial chest CT is; of all else a plain sentence says why not.

Judged on headers alone, before any pixel is decoded, and in the order in which a reader would ask: what kind of object,
which kind of image, how it lies, which part of the body, whether it is whole, whether it is enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydicom.uid import UID

from node.intake.assembly import ClosedSeries
from node.intake.header import InstanceHeader
from node.intake.stack import Acquisition, Tiling, acquisitions, normal, tile
from node.intake.verdict import Verdict

#: CT Image, Enhanced CT Image and Legacy Converted Enhanced CT Image Storage (PS3.4 B.5).
CT_CLASSES = frozenset(
    ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"),
)

#: Degrees between slice normal and body axis up to which slices are axial. Patients and tables lie askew by a few;
#: reformats along an airway or vessel by tens.
MAX_OBLIQUE_DEG = 10.0

#: Degrees up to which slices are meant to be axial, be it with a tilted gantry (they tilt by up to 30).
MAX_LEAN_DEG = 30.0

#: Degrees of gantry tilt, or of shear between slices, from which a stack is no rectangular volume.
MAX_TILT_DEG = 1.0

#: mm of slice thickness, and of slice spacing. 5 mm is the coarsest routine chest CT; beyond, volumes in ml and lesions
#: of a centimetre are guesses.
MAX_SLICE_MM = 6.0

#: mm along the body axis below which adult lungs cannot be whole (they measure some 200 to 300 mm).
MIN_COVERAGE_MM = 150.0

#: Slices: the least coverage at the coarsest spacing.
MIN_SLICES = 25

#: Values of Image Type (PS3.3 C.8.2.1.1.1, C.8.15.2.1, and makers' own) that name what was computed from the slices.
#: DERIVED alone does not: a lossy compressed slice has it too (C.7.6.1.1.2).
# fmt: off
REFORMATS = frozenset([
    "MPR", "CPR", "REFORMATTED", "AVERAGE", "MIP", "MINIP", "MAX_IP", "MIN_IP", "MAXIP", "PROJECTION", "PERFUSION",
    "VRT", "VOLUME_RENDERED", "VOLREND", "SSD", "SUBTRACT", "SUBTRACTION", "FUSION", "OVERLAY",
])
# fmt: on

#: Stems that name the chest in Body Part Examined; DICOM's own are CHEST, LUNG, CHESTABDOMEN, CHESTABDPELVIS and
#: NECKCHESTABDPELV (PS3.16 annex L), scanners write more.
CHEST = ("CHEST", "CHST", "THOR", "TORAX", "TORACE", "TORACICA", "LUNG", "PULMO", "POUMON", "BRUST", "POITRINE", "CXR")
#: Abbreviations of several parts with the chest: whole words only.
CHEST_WORDS = frozenset(("TAP", "CAP", "NCAP", "NTAP", "TAPS", "CHABPE"))

#: Stems that name another part. Values that name neither, and empty ones, are let through: the attribute is optional
#: and often wrong.
# fmt: off
OTHER_PARTS = (
    "HEAD", "BRAIN", "SKULL", "CRAN", "NECK", "SINUS", "ORBIT", "FACE", "FACIAL", "JAW", "MANDIB", "DENTAL", "TEETH",
    "EAR", "IAC", "TEMPORAL", "SPINE", "SPINAL", "LUMB", "SACR", "COCCYX", "ABD", "LIVER", "KIDNEY", "RENAL",
    "PANCREAS", "SPLEEN", "COLON", "BOWEL", "PELV", "BLADDER", "PROSTATE", "UTERUS", "HIP", "FEMUR", "LEG", "KNEE",
    "TIB", "ANKLE", "FOOT", "TOE", "CALC", "SHOULDER", "CLAVIC", "HUMERUS", "ARM", "ELBOW", "WRIST", "HAND", "FINGER",
    "EXTREM", "HEART", "CARDIAC", "CORONARY", "CAROTID", "BREAST", "PHANTOM",
)
# fmt: on
#: Values of Body Part Examined that a reason quotes: those of PS3.16 annex L and what scanners write in their place. Of
#: any other value, which may be text that somebody typed, it names the stem.
# fmt: off
PART_TERMS = frozenset([
    "ABDOMEN", "ABDOMENPELVIS", "ABDOMEN_PELVIS", "ANKLE", "ARM", "BRAIN", "BREAST", "CALCANEUS", "CAROTID",
    "CERVICAL_SPINE", "CLAVICLE", "COCCYX", "COLON", "CORONARY", "CSPINE", "EAR", "ELBOW", "EXTREMITY", "FACE", "FEMUR",
    "FINGER", "FOOT", "HAND", "HEAD", "HEADNECK", "HEAD_NECK", "HEART", "HIP", "HUMERUS", "IAC", "JAW", "KIDNEY",
    "KNEE", "LEG", "LIVER", "LSPINE", "LUMBAR_SPINE", "NECK", "ORBIT", "PANCREAS", "PELVIS", "PHANTOM", "PROSTATE",
    "SHOULDER", "SINUS", "SKULL", "SPINE", "SSPINE", "TEMPORAL_BONE", "THORACIC_SPINE", "TSPINE", "WRIST",
])
# fmt: on
#: Modalities that a reason quotes (PS3.3 C.7.3.1.1.1, with the retired ones that archives hold).
# fmt: off
MODALITIES = frozenset([
    "ANN", "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CF", "CR", "CS", "CT", "CTPROTOCOL", "DD", "DF", "DG", "DM", "DMS",
    "DOC", "DS", "DX", "EC", "ECG", "EEG", "EMG", "EOG", "EPS", "ES", "FA", "FID", "FS", "GM", "HC", "HD", "IO", "IOL",
    "IVOCT", "IVUS", "KER", "KO", "LEN", "LP", "LS", "M3D", "MA", "MG", "MR", "MS", "NM", "OAM", "OCT", "OP", "OPM",
    "OPR", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PA", "PLAN", "POS", "PR", "PT", "PX", "REG", "RESP", "RF",
    "RG", "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM",
    "SMR", "SR", "SRF", "ST", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "VF", "XA", "XAPROTOCOL", "XC",
])
# fmt: on
#: A spine is no chest, even a thoracic one: its field of view leaves the lungs out.
SPINE = ("SPINE", "SPINAL", "LUMB")


def triage(series: ClosedSeries) -> list[Verdict]:
    """Judge a closed series by its headers.

    Parameters
    ----------
    series
        As `node.intake.assembly` closed it; needs at least one instance.

    Returns
    -------
    list[Verdict]
        One about the whole series; or one for each of its acquisitions that is to be analysed or told of, when one or
        more are to be analysed.
    """
    tiling = tile(series.instances)
    for refusal in _refusals(series, tiling):
        verdicts = [verdict for one in acquisitions(series.instances) for verdict in _acquisition(series, one)]
        if any(verdict.analyse for verdict in verdicts):
            return verdicts
        # What is said of the series as a whole may be true of its stray slices alone.
        reason = verdicts[0].reason if tiling.strays and len(verdicts) == 1 else f"not analysed: {refusal}"
        return [Verdict(False, reason, tell=_is_expected(series.instances))]
    return [Verdict(True, _described(series, tiling))]


def _described(series: ClosedSeries, tiling: Tiling) -> str:
    first = series.instances[0]
    part = "axial chest CT" if _names_chest(first.body_part) else "axial CT, body part not given as chest"
    count = sum(len(header.positions) for header in series.instances)
    return f"{part}, {count} slices every {tiling.step:.1f} mm over {tiling.extent_mm:.0f} mm"


def _acquisition(series: ClosedSeries, acquisition: Acquisition) -> Iterator[Verdict]:
    """The verdict on one acquisition of a series; none where nobody would miss it.

    Of several reconstructions the one that shows most is analysed: the longest along the body, then the most closely
    spaced, then the one that came first.
    """
    stacks = []
    for n, (name, numbers) in enumerate(acquisition.reconstructions):
        alone = _alone(series, numbers)
        tiling = tile(alone.instances)
        refusal = next(_refusals(alone, tiling), "")
        most = (refusal != "", round(-tiling.extent_mm, -1), round(tiling.step, 1), n)
        stacks.append((most, name, numbers, refusal, alone, tiling))
    _, name, numbers, refusal, alone, tiling = min(stacks)
    if refusal:
        if _is_expected(alone.instances):
            yield Verdict(False, f"not analysed: {refusal}", True, numbers, acquisition=acquisition.name)
        return
    others = "; its other reconstructions are not analysed" if len(acquisition.reconstructions) > 1 else ""
    called = ", ".join(filter(None, (acquisition.name, name))) or "those of an axial chest CT"
    yield Verdict(
        True,
        f"{_described(alone, tiling)}{f'; {name}{others}' if others else ''}",
        part=numbers,
        note=f"Analysed are {len(numbers)} images of the series: {called}{others}.",
        acquisition=acquisition.name,
    )


def _alone(series: ClosedSeries, numbers: Sequence[int]) -> ClosedSeries:
    """A part of the series as if it were one."""
    headers = tuple(series.instances[n] for n in numbers)
    alone = replace(series, instances=headers, paths=())
    if series.only_gaps and (tiling := tile(headers)).kind == "gap":
        return replace(alone, reason=f"incomplete: {tiling.detail}")
    if series.only_gaps and not _lacks_numbers_beside(series.instances, headers):
        return replace(alone, complete=True)
    return alone


def _lacks_numbers_beside(everything: Sequence[InstanceHeader], part: Sequence[InstanceHeader]) -> bool:
    """Whether instance numbers of the series are missing next to those of a part, so that slices of it may be."""
    known = {header.instance_number for header in everything if header.instance_number is not None}
    own = {header.instance_number for header in part if header.instance_number is not None}
    return any(min(known) < beside < max(known) and beside not in known for n in own for beside in (n - 1, n + 1))


def _refusals(series: ClosedSeries, tiling: Tiling) -> Iterator[str]:
    """Reasons against, the plainest first."""
    headers = series.instances
    yield from _kind(headers)
    yield from _image_type(headers)
    yield from _orientation(headers)
    yield from _body_part(headers)
    if not series.complete:
        yield series.reason if series.reason.startswith("incomplete") else f"incomplete: {series.reason}"
    yield from _stack(headers, tiling)


def _is_expected(headers: Sequence[InstanceHeader]) -> bool:
    """Whether this looks like a chest CT that would be analysed, were nothing wrong with it."""
    if any(True for check in (_kind, _image_type, _body_part) for _ in check(headers)):
        return False
    axial = all((direction := normal(header)) and _degrees(direction[2]) <= MAX_LEAN_DEG for header in headers)
    return axial and sum(len(header.positions) for header in headers) >= MIN_SLICES


def _kind(headers: Sequence[InstanceHeader]) -> Iterator[str]:
    for header in headers:
        if header.sop_class_uid in _KINDS:
            yield _KINDS[header.sop_class_uid]
        elif header.sop_class_uid not in CT_CLASSES:
            uid = UID(header.sop_class_uid)
            yield f"no CT images, but {uid.name.removesuffix(' Storage') if uid.name != uid else 'a private object'}"
        elif header.modality != "CT":
            unlisted = "unknown" if header.modality else "not given"
            yield f"modality {header.modality if header.modality in MODALITIES else unlisted}, not CT"


def _image_type(headers: Sequence[InstanceHeader]) -> Iterator[str]:
    localizers = sum("LOCALIZER" in _words(header.image_type) for header in headers)
    if localizers == len(headers):
        yield "localizer (scout view)"
    elif localizers:
        yield f"{localizers} localizers among the slices"
    for header in headers:
        words = _words(header.image_type)
        if computed := sorted(words & REFORMATS):
            yield f"derived images ({', '.join(computed).lower()}), not the original slices"


def _orientation(headers: Sequence[InstanceHeader]) -> Iterator[str]:
    directions = [normal(header) for header in headers]
    known = [direction for direction in directions if direction]
    if len(known) < len(headers) or not all(header.positions for header in headers):
        yield "slices without position or orientation"
        return
    for x, y, z in known:
        if _degrees(z) > MAX_OBLIQUE_DEG:
            # A tilted gantry leans the slice but not the row; the table still moves along the body.
            leaning = _degrees(z)
            if _shear_deg(headers) > MAX_TILT_DEG:
                yield f"gantry tilt of {leaning:.0f} degrees"
            plane = {_degrees(x): "sagittal", _degrees(y): "coronal"}
            nearest = min(plane)
            yield f"{plane[nearest] if nearest <= 45 else 'oblique'} slices, not axial"
    tilt = max(abs(header.gantry_tilt or 0.0) for header in headers)
    if max(tilt, shear := _shear_deg(headers)) > MAX_TILT_DEG:
        yield f"gantry tilt of {max(tilt, shear):.0f} degrees"


def _body_part(headers: Sequence[InstanceHeader]) -> Iterator[str]:
    for part in {header.body_part for header in headers}:
        letters = _letters(part)
        stem = next((stem for stem in OTHER_PARTS if stem in letters), None)
        if stem and not _names_chest(part):
            yield f"body part {letters if letters in PART_TERMS else stem}, not chest"


def _stack(headers: Sequence[InstanceHeader], tiling: Tiling) -> Iterator[str]:
    if tiling.layers > 1:
        yield f"{tiling.layers} slices at each place (phases or reconstructions in one series)"
    count = sum(len(header.positions) for header in headers)
    if len({(header.rows, header.columns) for header in headers}) > 1:
        yield "slices differ in matrix size"
    thickness = max((header.slice_thickness or 0.0 for header in headers), default=0.0)
    if thickness > MAX_SLICE_MM:
        yield f"slices are {thickness:.1f} mm thick; at most {MAX_SLICE_MM:g} mm can be analysed"
    if count < MIN_SLICES:
        yield f"{count} slice{'s' if count > 1 else ''}; at least {MIN_SLICES} are needed"
    if tiling.kind != "even":
        yield f"slices make no regular stack: {tiling.detail}"
    if tiling.step > MAX_SLICE_MM:
        yield f"slices are {tiling.step:.1f} mm apart; at most {MAX_SLICE_MM:g} mm can be analysed"
    if tiling.extent_mm < MIN_COVERAGE_MM:
        yield f"slices cover {tiling.extent_mm:.0f} mm; whole lungs need at least {MIN_COVERAGE_MM:g} mm"
    if tiling.strays:
        yield f"{tiling.strays} slices of another acquisition among the others"


#: SOP classes that sit beside CT series in a study, in the words of those who read the verdict.
_KINDS = {
    "1.2.840.10008.5.1.4.1.1.88.67": "dose report",
    "1.2.840.10008.5.1.4.1.1.88.76": "dose report",
    "1.2.840.10008.5.1.4.1.1.88.11": "structured report",
    "1.2.840.10008.5.1.4.1.1.88.22": "structured report",
    "1.2.840.10008.5.1.4.1.1.88.33": "structured report",
    "1.2.840.10008.5.1.4.1.1.88.34": "structured report",
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.1": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.2": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.3": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.7.4": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.128": "PET images, not CT",
    "1.2.840.10008.5.1.4.1.1.130": "PET images, not CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR images, not CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR images, not CT",
}


def _words(values: Sequence[str]) -> frozenset[str]:
    """Values and the words in them: makers write 'CT_SOM5 MPR' or 'PROJECTION IMAGE' as one value."""
    upper = [value.upper() for value in values]
    return frozenset(upper) | frozenset(word for value in upper for word in value.split())


def _letters(part: str) -> str:
    """Capitals, joined by underscores (a CS has no accents, PS3.5 6.2)."""
    return re.sub(r"[^A-Z]+", "_", part.upper()).strip("_")


def _names_chest(part: str) -> bool:
    letters = _letters(part)
    if any(stem in letters for stem in SPINE):
        return False
    return any(stem in letters for stem in CHEST) or not CHEST_WORDS.isdisjoint(letters.split("_"))


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(min(1.0, abs(cosine))))


def _shear_deg(headers: Sequence[InstanceHeader]) -> float:
    """Angle between the slice normal and the way from the first slice to the last."""
    direction = normal(headers[0])
    places = [position for header in headers for position in header.positions]
    if direction is None or len(places) < 2:
        return 0.0
    along = [sum(a * b for a, b in zip(direction, place, strict=True)) for place in places]
    first, last = places[along.index(min(along))], places[along.index(max(along))]
    way = [b - a for a, b in zip(first, last, strict=True)]
    length = math.hypot(*way)
    return _degrees(sum(a * b for a, b in zip(direction, way, strict=True)) / length) if length > 1.0 else 0.0
