# Copyright Contributors to the pyro_iwae project.
# SPDX-License-Identifier: Apache-2.0

"""Opens the built pages in headless Chromium, as a phone and a screen show them, light and dark; takes pictures.

A page that is wider than its window, or that fails to load a picture or a script of its own, is an error. Needs
``pip install selenium``, Chromium and ChromeDriver.

python docs/look.py docs/_build/html docs/_build/screenshots
"""

from __future__ import annotations

import base64
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread

from selenium import webdriver
from tqdm import tqdm

WINDOWS = {"phone": (390, 844), "screen": (1280, 900)}
TALLEST = 16_000  # pixels that a picture may have
LEFT_OUT = ("_modules", "genindex.html", "py-modindex.html", "search.html")

# What sticks out on the right, and is in nothing that scrolls.
WIDER = """
const wide = document.documentElement.clientWidth + 1;
if (document.documentElement.scrollWidth <= wide) return [];
const scrolls = e => e && e !== document.body && (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)
    || scrolls(e.parentElement));
return [...document.querySelectorAll('main *, article *')]
    .filter(e => e.getBoundingClientRect().right > wide && !scrolls(e))
    .map(e => e.tagName + '.' + e.className + ': ' + (e.textContent || '').trim().slice(0, 60))
    .slice(0, 5).concat(['the page']);
"""
# Formulas are set when MathJax says so, if it could be had.
SET = """
const done = arguments[0], formulas = window.MathJax && MathJax.startup && MathJax.startup.promise;
const limit = new Promise(resolve => setTimeout(resolve, 10000));
Promise.race([Promise.resolve(formulas), limit]).then(() => setTimeout(done, 100));
"""
UNSET = "return document.querySelector('.math') && !document.querySelector('mjx-container');"
MISSING = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src);"


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    return webdriver.Chrome(options=options)


def look(driver: webdriver.Chrome, address: str, window: str, scheme: str, picture: Path) -> list[str]:
    """Takes the picture; what is wrong with the page."""
    width, height = WINDOWS[window]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": window == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(address)
    driver.set_script_timeout(30)
    driver.execute_async_script(SET)
    found = [f"wider than its window: {what}" for what in driver.execute_script(WIDER)]
    found += ["formulas are not set"] if driver.execute_script(UNSET) else []
    found += [f"no picture: {source}" for source in driver.execute_script(MISSING)]
    found += [
        entry["message"]
        for entry in driver.get_log("browser")
        if "127.0.0.1" in entry["message"] and "favicon" not in entry["message"]
    ]
    whole = {"x": 0, "y": 0, "width": width, "scale": 1}
    whole["height"] = min(TALLEST, driver.execute_script("return document.documentElement.scrollHeight"))
    options = {"captureBeyondViewport": True, "clip": whole}
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))
    return found


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def main(root: Path, output: Path) -> int:
    pages = [p.relative_to(root) for p in sorted(root.rglob("*.html"))]
    pages = [p for p in pages if not any(part in LEFT_OUT for part in p.parts)]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    Thread(target=server.serve_forever, daemon=True).start()
    driver, problems = browser(), []
    try:
        for page in tqdm(pages, desc="pages"):
            address = f"http://127.0.0.1:{server.server_port}/{page.as_posix()}"
            for window, scheme in product(WINDOWS, ("light", "dark")):
                picture = output / f"{'-'.join(page.with_suffix('').parts)}-{window}-{scheme}.png"
                found = look(driver, address, window, scheme, picture)
                problems += [f"{page}, {window}, {scheme}: {what}" for what in found]
    finally:
        driver.quit()
        server.shutdown()
    print("\n".join(problems) or f"{len(pages)} pages fit their windows; pictures are in {output}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(*(Path(path).resolve() for path in sys.argv[1:])))
