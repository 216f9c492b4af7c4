"""What a browser does with the page, by HTTP: upload, press a button, read what is streamed."""

import html
import json
import secrets
import urllib.error
import urllib.request
import uuid


class Refused(Exception):
    """An HTTP status other than 200."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text[:300]}")
        self.status = status


class Visitor:
    """One browser tab."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.session = secrets.token_hex(5)
        self.config = json.loads(self.get("/config"))
        components = self.config["components"]
        self.ids = {one["props"]["elem_id"]: one["id"] for one in components if one["props"].get("elem_id")}
        self.sampling = [0, 1, 12]  # temperature, top-p, longest answer
        self.upload_value = None

    def request(self, path, data=None, headers=None, method=None, timeout=500):
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from None

    def get(self, path, **kwargs):
        with self.request(path, **kwargs) as response:
            return response.read().decode(errors="replace")

    def upload(self, content, name="picture.png"):
        """Sends a file; returns its place on the server."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        with self.request("/gradio_api/upload", body, headers) as response:
            return json.loads(response.read())[0]

    def choose(self, content, name="picture.png"):
        """Uploads an image and looks at it, as the page does. Returns the messages that Gradio sent."""
        path = self.upload(content, name)
        self.upload_value = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        return self.press("image", "change", [self.upload_value])

    def ask(self, question):
        return self.press("ask", "click", self.data(question))

    def retry(self):
        return self.press("retry", "click", self.data(""))

    def data(self, question):
        """What the page sends with a question; the first value is the server's own."""
        return [None, question, self.upload_value, *self.sampling]

    def join(self, element, event, data):
        """Puts an event into the queue."""
        number = next(
            dependency["id"]
            for dependency in self.config["dependencies"]
            if [self.ids[element], event] in [list(target) for target in dependency["targets"]]
        )
        body = {"data": data, "fn_index": number, "session_hash": self.session, "trigger_id": self.ids[element]}
        headers = {"Content-Type": "application/json"}
        with self.request("/gradio_api/queue/join", json.dumps(body).encode(), headers) as response:
            return json.loads(response.read())["event_id"]

    def messages(self, event_id):
        """What the server streams about an event, until it is complete."""
        with self.request(f"/gradio_api/queue/data?session_hash={self.session}") as response:
            for line in response:
                if line.startswith(b"data:"):
                    message = json.loads(line[5:])
                    if message.get("event_id") not in (event_id, None):
                        continue
                    yield message
                    if message["msg"] in ("process_completed", "close_stream"):
                        return

    def press(self, element, event="click", data=()):
        return list(self.messages(self.join(element, event, list(data))))


def warnings_of(messages):
    """Texts of the notes that popped up."""
    return [message["log"] for message in messages if message["msg"] == "log"]


def conversation_of(messages):
    """`[(role, text)]` as the page shows it at the end."""
    completed = messages[-1]
    assert completed["msg"] == "process_completed" and completed["success"], completed
    said = completed["output"]["data"][0]
    return [(one["role"], html.unescape("".join(part["text"] for part in one["content"]))) for one in said]


def generating(messages):
    return [message for message in messages if message["msg"] == "process_generating"]
