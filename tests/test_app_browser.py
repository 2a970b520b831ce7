"""The page in a real browser: Debian's Chromium, without a window, and nothing but this machine.

Without a browser these tests are skipped; where CI=true, they fail.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlparse

import pytest
from evaluations import write_evaluation

from convfusion.imports import is_installed

PATIENCE = 60  # seconds for anything to appear
STEPS = 4  # of a picture
LEFT = ("AbortError", "Connection errored out")  # what a page that is left says of what it awaits

# Whatever the server process connects to, looks up or starts is written down.
SERVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off
log = open(sys.argv.pop(1), "a", buffering=1)
def watch(event, args):
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = args
    else:
        return
    if str(address[0]) not in ("127.0.0.1", "::1", "localhost", "None"):
        log.write(f"{event} {address}\\n")
sys.addaudithook(watch)
from convfusion.cli import main
main()
"""


def check_browser():
    """Skip where there is no browser to test with; fail where there must be one."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    missing += [name for name in ("gradio", "selenium") if not is_installed(name)]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"the page cannot be tested without {', '.join(missing)}")
    if missing:
        pytest.skip(f"without {', '.join(missing)}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Where the server keeps what is shown."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def address(tmp_path_factory, pictures):
    """The page of the embedded model, served by the command as a user types it."""
    check_browser()
    log = tmp_path_factory.mktemp("server") / "reached"
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(log), "app", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "TMPDIR": str(pictures)},
    )
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=PATIENCE)
    assert server.returncode == 0
    assert log.read_text() == "", "the server reached for another machine"
    assert not list(pictures.glob("convfusion-*"))
    assert not (pictures / ".ses").exists(), "onnxruntime has begun a session of its telemetry"


@pytest.fixture(scope="module")
def driver(address):
    """A browser; in the end, everything that it asked for lay on this machine."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    made = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    made.asked = []
    yield made
    gather(made)
    made.quit()
    assert len(made.asked) > 20, "the browser's log is empty"
    strange = [url for url in made.asked if urlparse(url).scheme not in ("data", "blob")]
    strange = [url for url in strange if not url.startswith(f"{address}/")]
    assert strange == [], "the page asked another machine for something"


def gather(driver):
    """Keep the addresses of all requests since the last time."""
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            driver.asked.append(message["params"]["request"]["url"])


@pytest.fixture
def page(driver, address):
    """The page, freshly opened on a wide screen."""
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.set_window_size(1280, 1000)
    yield Page(driver, address)
    gather(driver)
    errors = [each for each in driver.get_log("browser") if each["level"] == "SEVERE"]
    assert [each for each in errors if not any(word in each["message"] for word in LEFT)] == []


class Page:
    """What a visitor does with a page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.find("#draw").is_displayed())

    def find(self, place):
        return self.driver.find_element("css selector", place)

    def count(self, place):
        return len(self.driver.find_elements("css selector", place))

    def text(self, place):
        return self.find(place).text

    def wait(self, holds, seconds=PATIENCE):
        """Wait until something holds, and return it; elements may come and go meanwhile."""
        from selenium.common.exceptions import WebDriverException

        last, until = None, time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if last := holds():
                    return last
            except WebDriverException as error:
                last = error
            time.sleep(0.05)
        raise AssertionError(f"it did not come about: {last}; {self.find('body').text}")

    def wait_for(self, place, words):
        return self.wait(lambda: words in self.text(place) and self.text(place))

    def click(self, place):
        element = self.find(place)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def type(self, place, text):
        """Put a text into a field in place of what is there."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(f"{place} :is(input, textarea)")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)
        field.send_keys(Keys.TAB)

    def open_tab(self, name):
        for tab in self.driver.find_elements("css selector", "button[role=tab]"):
            if tab.text == name:
                tab.click()
                return
        raise AssertionError(f"there is no tab {name}")

    def draw(self, steps=STEPS):
        self.type("#steps", str(steps))
        self.press("#draw", "Drawn.")

    def press(self, place, words):
        """Click something that draws, and wait for a new line of the status with these words."""
        self.wait(lambda: self.find("#draw").is_enabled())
        self.driver.execute_script("document.querySelector('#status p').id = 'before'")
        self.click(place)
        return self.wait_for("#status p:not(#before)", words)

    def sources(self):
        """Where the three pictures lie: their names are those of their content."""

        def loaded():
            places = [f"#picture-{side} img" for side in ("teacher", "student", "removed")]
            images = [self.find(place) for place in places]
            whole = [image.get_attribute("naturalWidth") == "512" for image in images]
            return all(whole) and [urlparse(each.get_attribute("src")).path for each in images]

        return self.wait(loaded)

    def emulate_phone(self):
        metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def is_within_the_screen(self):
        """Whether nothing makes the page scroll sideways."""
        wide = "return [document.documentElement.scrollWidth, innerWidth]"
        whole, shown = self.driver.execute_script(wide)
        return whole <= shown == 400

    def click_in(self, place, right, down):
        """Click into an element, so many pixels from its middle."""
        from selenium.webdriver import ActionChains

        element = self.find(place)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element_with_offset(
            element, right, down
        ).click().perform()


def test_drawing_and_giving_a_site_its_attention_back(page):
    assert "press Draw" in page.text("#status") and not page.find("#stop").is_enabled()
    page.draw()
    assert page.text("#caption-teacher").startswith("teacher · ")
    before = page.text("#caption-student")
    assert "PSNR" in before and "PSNR" in page.text("#caption-removed")
    teacher, student, removed = page.sources()
    assert len({teacher, student, removed}) == 3
    page.wait(lambda: page.count("#slider img") == 2)
    page.press("#sites input", "Drawn.")
    page.wait_for("#caption-student", "attention at 1 site")
    again = page.wait(lambda: page.sources()[1] != student and page.sources())
    assert (again[0], again[2]) == (teacher, removed)
    page.press("#sites input", "Drawn.")
    page.wait(lambda: "attention" not in page.text("#caption-student"))
    page.wait(lambda: page.sources() == [teacher, student, removed])


def test_a_click_on_the_picture_shows_what_every_site_sees(page):
    page.open_tab("Look")
    page.wait_for("#look-status", "Draw a picture under Compare first")
    page.open_tab("Compare")
    page.draw()
    page.open_tab("Look")
    page.wait_for("#look-status", "Click a point")
    page.click_in("#look-picture img", 40, -60)
    page.wait(lambda: page.count(".cf-card") == 7)
    assert "Step 2 of 4, timestep" in page.text("#look-status")
    assert page.count(".cf-card figure") == 14 and "80% within" in page.text(".cf-card")
    first = page.find(".cf-card figure img").get_attribute("src")
    page.click_in("#look-picture img", -60, 60)
    page.wait(lambda: page.find(".cf-card figure img").get_attribute("src") != first)


def test_a_drawing_can_be_stopped(page):
    page.type("#steps", "200")
    page.press("#draw", "Drawing: teacher, step")
    assert not page.find("#draw").is_enabled()
    page.click("#stop")
    page.wait_for("#status", "Stopped.")
    page.wait(lambda: page.find("#draw").is_enabled() and not page.find("#stop").is_enabled())
    page.draw(2)


def test_bad_input_is_a_message_and_the_page_goes_on(page):
    page.type("#prompt", "")
    page.press("#draw", "there is no prompt")
    page.type("#prompt", "red apple, noto")
    page.type("#steps", "5000")
    page.press("#draw", "at most 250 steps")
    page.press("#sites input", "nothing is drawn yet")
    page.draw(2)


def test_two_visitors_at_once_do_not_mix(page, driver, address):
    page.draw()
    mine = page.sources()
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    other = Page(driver, address)
    other.type("#prompt", "green apple, noto")
    other.draw()
    theirs = other.sources()
    assert not set(mine) & set(theirs)
    other.type("#steps", str(STEPS + 1))
    other.press("#draw", "Drawing: ")
    second = driver.current_window_handle
    driver.switch_to.window(first)
    page.click("#sites input")  # for this visitor alone
    driver.switch_to.window(second)
    other.wait_for("#status", "Drawn.")
    other.draw()
    assert other.sources() == theirs
    driver.close()
    driver.switch_to.window(first)
    page.wait_for("#caption-student", "attention at 1 site")
    page.wait(lambda: page.sources()[1] != mine[1])
    assert page.sources()[0] == mine[0]


def test_a_page_that_is_closed_leaves_nothing_behind(page, driver, address, pictures):
    page.draw(2)
    first, kept = driver.current_window_handle, page.wait(lambda: visits(pictures))
    driver.switch_to.new_window("tab")
    other = Page(driver, address)
    other.draw(2)
    assert len(visits(pictures) - kept) == 1
    other.type("#steps", "250")
    other.press("#draw", "Drawing: teacher, step")
    driver.close()
    driver.switch_to.window(first)
    page.wait(lambda: visits(pictures) <= kept)
    page.draw(2)


def visits(pictures):
    return set(pictures.glob("convfusion-visit-*"))


def test_an_evaluation_on_the_page(page, tmp_path):
    page.open_tab("Evaluate")
    page.wait_for("#evaluate-status", "Name a folder")
    page.type("#folder", str(tmp_path))
    page.click("#open")
    page.wait_for("#evaluate-status", "no finished evaluation")
    write_evaluation(tmp_path, [20.0, 12.5, 30.0])
    page.click("#open")
    page.wait_for("#evaluate-status", "mine: 3 samples, the worst first")
    page.wait(lambda: page.count("#gallery img") == 3)
    page.click("#gallery button:has(img)")
    assert "PSNR 12.5 dB" in page.wait_for("#sample", "prompt 1")


def test_nothing_is_wider_than_a_phone(page, tmp_path):
    page.emulate_phone()
    assert page.wait(page.is_within_the_screen)
    page.draw(2)
    page.sources()
    assert page.is_within_the_screen()
    page.open_tab("Look")
    page.wait(lambda: page.count("#look-picture img"))
    page.click_in("#look-picture img", 10, 10)
    page.wait(lambda: page.count(".cf-card") == 7)
    assert page.is_within_the_screen()
    write_evaluation(tmp_path, [20.0, 12.5, 30.0])
    page.open_tab("Evaluate")
    page.wait(lambda: page.count("#folder"))
    page.type("#folder", str(tmp_path))
    page.click("#open")
    page.wait(lambda: page.count("#gallery img") == 3)
    page.click("#gallery button:has(img)")
    page.wait_for("#sample", "prompt 1")
    assert page.is_within_the_screen()


def test_another_name_for_this_address_is_not_answered(address):
    """As where a page elsewhere points a name of its own here, to read what the visitor draws."""
    host, port = urlparse(address).hostname, urlparse(address).port
    with socket.create_connection((host, port)) as plug:
        plug.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n")
        assert plug.recv(64).startswith(b"HTTP/1.1 400")
    with socket.create_connection((host, port)) as plug:
        plug.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        answer = plug.recv(4096).lower()
    assert answer.startswith(b"http/1.1 200") and b"default-src 'self'" in answer
