"""OHIF in a headless Chromium, on one origin with an Orthanc, and what it holds read back through its own services."""

from __future__ import annotations

import http.client
import json
import mimetypes
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Orthanc

#: The release that tests/peers.sh fetches from npm.
VERSION = "3.13.2"

#: Seconds for anything that a viewer does; a machine that is busy with other work is slow.
PATIENCE = 180

#: Software rendering: no test needs a GPU.
_FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]

_CONFIG = {
    "routerBasename": None,
    "extensions": [],
    "modes": [],
    "customizationService": {},
    "showStudyList": True,
    "maxNumberOfWebWorkers": 2,
    "showCPUFallbackMessage": False,
    "strictZSpacingForVolumeViewport": True,
    "investigationalUseDialog": {"option": "never"},
    "defaultDataSourceName": "archive",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "archive",
            "configuration": {
                "friendlyName": "archive",
                "name": "archive",
                "wadoUriRoot": "/wado",
                "qidoRoot": "/dicom-web",
                "wadoRoot": "/dicom-web",
                "qidoSupportsIncludeField": True,
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",
                "enableStudyLazyLoad": True,
                "omitQuotationForMultipartRequest": True,
                "bulkDataURI": {"enabled": True, "relativeResolution": "studies"},
            },
        }
    ],
}


def viewer_files() -> tuple[Path, str]:
    """OHIF's built files and the browser, or skip with what brings them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    dist = cache / "lungnode" / f"ohif-{VERSION}" / "dist"
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed; it comes with Debian's package of that name (tests/peers.sh)")
    if not (dist / "index.html").exists():
        pytest.skip(f"OHIF is not in {dist}; tests/peers.sh fetches it with npm")
    return dist, browser


@contextmanager
def served(orthanc: Orthanc, dist: Path) -> Iterator[str]:
    """OHIF's files and Orthanc's DICOMweb under one address."""
    archive = urlsplit(orthanc.http).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith(("/dicom-web", "/wado")):
                self._archive()
            elif path == "/app-config.js":
                self._send(200, "application/javascript", f"window.config = {json.dumps(_CONFIG)};".encode())
            else:
                file = (dist / path.lstrip("/")).resolve()
                known = file.is_file() and file.is_relative_to(dist.resolve())
                if not known and file.suffix:
                    self._send(404, "text/plain", b"")
                    return
                file = file if known else dist / "index.html"
                self._send(200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes())

        def _archive(self) -> None:
            # With the name that the browser used, from which Orthanc makes the addresses of bulk data.
            wanted = {name: self.headers[name] for name in ("Accept", "Host") if name in self.headers}
            # Closed before the browser is answered, which may be gone by then.
            with closing(http.client.HTTPConnection(archive, timeout=PATIENCE)) as connection:
                connection.request("GET", self.path, headers=wanted)
                answer = connection.getresponse()
                status, kind, body = answer.status, answer.headers["Content-Type"] or "text/plain", answer.read()
            self._send(status, kind, body)

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A browser that goes away in the middle of an answer is no fault."""

    mimetypes.add_type("application/wasm", ".wasm")
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Viewer:
    """One open study."""

    page: Any
    folder: Path
    #: Errors of the console and of the page, and everything shown in a toast or a dialog.
    complaints: list[str] = field(default_factory=list)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll until `condition` gives something; fail naming `what`."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := condition():
                return found
            self.page.wait_for_timeout(200)
        self.shoot("gave-up")
        pytest.fail(f"waited {PATIENCE} s for {what}; screenshot in {self.folder}; {self.complaints}")

    def sets(self) -> list[dict[str, Any]]:
        """Display sets: what the viewer made of each series."""
        return list(self.page.evaluate(_SETS) or [])

    def series(self, uid: str) -> dict[str, Any] | None:
        """The display set of a series."""
        return next((one for one in self.sets() if one["series"] == uid), None)

    def open(self, uid: str) -> dict[str, Any]:
        """Double-click a series' thumbnail; gives its display set once a viewport shows it."""
        found = self.until(lambda: self.series(uid), "the series in the study browser")
        thumbnail = self.page.locator(f'[id="thumbnail-{found["uid"]}"]')
        thumbnail.scroll_into_view_if_needed()
        thumbnail.dblclick()
        return dict(self.until(lambda: (self.series(uid) or {}).get("shown") and self.series(uid), "the series shown"))

    def open_segmentation(self, uid: str) -> dict[str, Any]:
        """Open a segmentation's series and say yes to what is asked; gives the voxels that the viewer holds."""
        found = self.until(lambda: self.series(uid), "the segmentation in the study browser")
        thumbnail = self.page.locator(f'[id="thumbnail-{found["uid"]}"]')
        thumbnail.scroll_into_view_if_needed()
        thumbnail.dblclick()
        button = self.page.locator('[data-cy="yes-hydrate-btn"]')
        self.until(button.count, "the question whether to open the segmentation")
        button.first.click()
        self.until(lambda: self.page.evaluate(_HOLDS, found["uid"]), "the segmentation's voxels")
        return dict(self.page.evaluate(_VOXELS, found["uid"]))

    def present(self, sop_instance_uid: str = "") -> None:
        """Show the active viewport in the lung window, and the slice of this instance if one is named."""

        def stays() -> bool:
            # The viewer puts another viewport in place of one that was, and goes to the first slice of what it has
            # opened, in its own time; one that is on its way out must be left alone.
            if not self.page.evaluate(_SETTLED):
                self.page.wait_for_timeout(1500)
                return False
            self.page.evaluate(_PRESENT, sop_instance_uid)
            self.page.wait_for_timeout(1500)
            return bool(self.page.evaluate(_PRESENT, sop_instance_uid))

        self.until(stays, "the slice in the lung window")

    def shoot(self, name: str) -> Any:
        """Screenshot into the folder; gives it as an array of RGB."""
        import numpy as np
        from PIL import Image

        self.page.screenshot(path=self.folder / f"{name}.png")
        return np.asarray(Image.open(self.folder / f"{name}.png").convert("RGB"), int)

    def until_picture(self, name: str, shows: Callable[[Any], bool]) -> Any:
        """Screenshot once it shows what it should; fail after a while."""
        return self.until(lambda: shows(picture := self.shoot(name)) and [picture], f"what {name}.png should show")[0]

    def notices(self) -> list[str]:
        """Toasts and dialogs on the page."""
        return list(self.page.evaluate(_NOTICES))


@contextmanager
def running_browser(program: str) -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=_FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(browser: Any, base: str, study: str, folder: Path) -> Iterator[Viewer]:
    """A viewer on `study`, once it shows its first image."""
    page = browser.new_page(viewport={"width": 1600, "height": 950})
    page.set_default_timeout(PATIENCE * 1000)
    viewer = Viewer(page, folder)
    # The frame of an embedded document has no storage.
    page.add_init_script("window.localStorage?.setItem('shownTours', JSON.stringify(['basicViewerTour']))")
    page.on("console", lambda told: viewer.complaints.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: viewer.complaints.append(f"page error: {error}"))
    page.on("crash", lambda: viewer.complaints.append("the page crashed"))
    try:
        page.goto(f"{base}/viewer?StudyInstanceUIDs={study}")
        page.locator(".cornerstone-canvas").first.wait_for()
        viewer.until(lambda: page.evaluate(_IMAGES) > 0, "the first image")
        yield viewer
    finally:
        page.close()


_IMAGES = """() => { const c = window.cornerstone && window.cornerstone.cache;
  return c && c._imageCache ? c._imageCache.size : 0; }"""

_NOTICES = """() => [...document.querySelectorAll('[data-sonner-toast],[role=alert],[role=dialog],[role=alertdialog]')]
  .map(e => e.innerText.replace(/\\n/g, ' | ').slice(0, 300))"""

_SETS = """() => {
  const S = window.services; if (!S) return null;
  return S.displaySetService.getActiveDisplaySets().map(d => ({
    uid: d.displaySetInstanceUID, series: d.SeriesInstanceUID, modality: d.Modality, loaded: !!d.isLoaded,
    unsupported: !!d.unsupported, handler: d.SOPClassHandlerId, pages: d.numImageFrames || 0,
    shown: [...S.viewportGridService.getState().viewports.values()].some(
      v => v.displaySetInstanceUIDs.includes(d.displaySetInstanceUID)),
    groups: (d.measurements || []).map(m => ({name: m.TrackingIdentifier || m.label, loaded: !!m.loaded,
      on_image: !!m.imageId, outlines: (m.coords || []).length,
      values: (m.labels || []).map(l => l.label + ': ' + l.value)}))
  }));
}"""

#: Whether the active viewport is the one that was there at the last call.
_SETTLED = """() => {
  const S = window.services, id = S.viewportGridService.getActiveViewportId();
  const viewport = S.cornerstoneViewportService.getCornerstoneViewport(id), before = window.lastViewport;
  window.lastViewport = viewport;
  return !!viewport && viewport === before;
}"""

#: Lung window and slice as wanted; whether they were already. C -600 W 1500 HU, as the captures have it.
_PRESENT = """async uid => {
  const S = window.services, id = S.viewportGridService.getActiveViewportId();
  const viewport = S.cornerstoneViewportService.getCornerstoneViewport(id);
  if (!viewport) return false;
  const found = uid ? viewport.getImageIds().findIndex(one => one.includes(`/instances/${uid}/`)) : -1;
  const index = found < 0 ? viewport.getCurrentImageIdIndex() : found, range = viewport.getProperties().voiRange;
  const there = index === viewport.getCurrentImageIdIndex() && range && Math.abs(range.lower + 1350) < 2;
  await viewport.setImageIdIndex(index);
  viewport.setProperties({voiRange: {lower: -1350, upper: 150}});
  viewport.render();
  return !!there;
}"""

_HOLDS = """uid => { const s = window.services.segmentationService.getSegmentation(uid);
  return !!(s && s.representationData && s.representationData.Labelmap); }"""

#: The voxels of a segmentation by label, as the viewer holds them.
_VOXELS = """uid => {
  const service = window.services.segmentationService, s = service.getSegmentation(uid);
  const map = s.representationData.Labelmap, segments = Object.values(s.segments || {}).filter(Boolean);
  const ids = new Set(map.imageIds || []);
  for (const l of Object.values(map.labelmaps || {})) (l.imageIds || []).forEach(i => ids.add(i));
  const counts = {};
  for (const id of ids) {
    const image = window.cornerstone.cache.getImage(id); if (!image) continue;
    const data = image.voxelManager ? image.voxelManager.getScalarData() : image.getPixelData();
    for (let k = 0; k < data.length; k++) if (data[k]) counts[data[k]] = (counts[data[k]] || 0) + 1;
  }
  return {counts,
    names: Object.fromEntries(segments.map(x => [x.segmentIndex, x.label])),
    colours: Object.fromEntries(segments.map(x => [x.segmentIndex, [...service.getSegmentColor(
      window.services.viewportGridService.getActiveViewportId(), uid, x.segmentIndex)].slice(0, 3)]))};
}"""
