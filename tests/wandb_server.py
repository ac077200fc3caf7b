"""A server on 127.0.0.1 with as much of W&B's protocol as wandb-core needs, which can be stopped at any moment.

Unknown requests are answered by an error and kept in `unknown`, so that a new release of wandb fails here first.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 3
ENTITY = "somebody"

# Requests that wandb can do without; the answer is an error.
_OPTIONAL = {"OrganizationCoreWeaveOrganizationID", "OrgFeatureFlags", "MarkRunFilesUploaded", "UpsertSweepState"}


@dataclass
class Run:
    """The received parts of a run."""

    name: str
    project: str
    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # file -> line number -> line
    ends: list[dict[str, Any]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # ids of artifacts

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


@dataclass
class Artifact:
    """One version of an artifact."""

    number: int
    collection: str
    type: str
    project: str
    version: int
    digest: str
    run: str  # that made it
    aliases: list[str]
    metadata: dict[str, Any]
    state: str = "PENDING"
    manifest: str = ""  # path of its list of files

    @property
    def id(self) -> str:
        return f"artifact-{self.number}"


class WandbServer:
    """A running server; `url` and `environment` are for its clients.

    Args:
        host: Address of the server.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.files: dict[str, bytes] = {}  # path -> content
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.failures: list[str] = []
        self.sweep: dict[str, Any] = {}
        self.trials: list[dict[str, Any]] = []  # commands for the agent, the next one last
        self.mute = threading.Event()  # takes every request and never answers
        self.status = 0  # answers everything with this HTTP status
        self.rejects_key = False
        self.refuses_files = False
        self.stops = False  # asks every run to stop, as a user or the early termination of a sweep does
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.start(0)

    def start(self, port: int) -> None:
        handler = type("Bound", (_Handler,), {"owner": self})
        self._server = _Server((self._host, port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop: connections are refused from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def again(self) -> None:
        self.start(self.port)

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    @property
    def environment(self) -> dict[str, str | None]:
        return {"WANDB_MODE": None, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": self.url, "WANDB_ERROR_REPORTING": "false"}

    def artifact(self, collection: str, alias: str) -> Artifact:
        for artifact in reversed(self.artifacts):
            if artifact.collection == collection and alias in (*artifact.aliases, f"v{artifact.version}"):
                return artifact
        raise KeyError(f"{collection}:{alias}")

    def files_of(self, artifact: Artifact) -> dict[str, bytes]:
        """Return name -> content of the uploaded files in the manifest."""
        contents = json.loads(self.files[artifact.manifest])["contents"]
        return {name: self.files[_blob_path(entry["digest"])] for name, entry in contents.items()}

    # ---- requests of wandb ----

    def answer(self, operation: str, given: dict[str, Any]) -> Any:
        with self._lock:
            self.operations.append(operation)
            known = getattr(self, f"_{operation}", None)
            if known is None:
                if operation not in _OPTIONAL:
                    self.unknown.append(operation)
                return None
            return known(given)

    def _Viewer(self, given: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "a@b.c", "flags": "{}", "teams": teams}
        return {"viewer": {**viewer, "name": ENTITY, "apiKeys": {"edges": []}, "admin": False, "deletedAt": None}}

    def _GetDefaultEntity(self, given: dict[str, Any]) -> Any:
        return self._Viewer(given)

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, given: dict[str, Any]) -> Any:
        name = given.get("name") or given["id"].removeprefix("run-")
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(name, given.get("project") or "uncategorized"))
        run.fields |= {key: value for key, value in given.items() if value is not None}
        run.config |= json.loads(given.get("config") or "{}")
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _bucket(self, run: Run) -> dict[str, Any]:
        project = {"id": "project", "name": run.project, "entity": {"id": "entity", "name": ENTITY}}
        return {
            "id": f"run-{run.name}",
            "name": run.name,
            "displayName": run.fields.get("displayName") or f"run-{run.name}",
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": run.fields.get("sweep"),
            "project": project,
            "historyLineCount": len(run.history),
        }

    def _RunResumeStatus(self, given: dict[str, Any]) -> Any:
        run = self.runs.get(given["name"])
        entity = {"id": "entity", "name": ENTITY}
        model = {"id": "project", "name": given["project"], "entity": entity, "bucket": None}
        if run is not None:
            history = [line for _, line in sorted(run.lines.get("wandb-history.jsonl", {}).items())]
            model["bucket"] = self._bucket(run) | {
                "summaryMetrics": json.dumps(run.summary),
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": len(run.lines.get("wandb-events.jsonl", {})),
                "historyTail": json.dumps(history[-1:]),
                "eventsTail": "[]",
                "tags": run.fields.get("tags") or [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": model}

    def _CreateRunFiles(self, given: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _RunState(self, given: dict[str, Any]) -> Any:
        return {"project": {"run": {"id": given["run"], "state": "running"}}}

    def _NotifyScriptableRunAlert(self, given: dict[str, Any]) -> Any:
        return {"notifyScriptableRunAlert": {"success": True}}

    # ---- artifacts ----

    def _ArtifactType(self, given: dict[str, Any]) -> Any:
        name = given["name"].partition(":")[0]
        versions = [artifact for artifact in self.artifacts if artifact.collection == name]
        return {"project": {"artifact": {"artifactType": {"name": versions[0].type}} if versions else None}}

    def _ProjectArtifactType(self, given: dict[str, Any]) -> Any:
        return {"project": {"artifactType": None}}

    def _FetchArtifactDigestAlgorithm(self, given: dict[str, Any]) -> Any:
        return {"project": {"artifactType": None}}

    def _XXHashDigestsEnabled(self, given: dict[str, Any]) -> Any:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _CreateArtifact(self, given: dict[str, Any]) -> Any:
        asked = given["input"]
        collection = asked["artifactCollectionName"]
        aliases = [alias["alias"] for alias in asked.get("aliases") or []]
        versions = [artifact for artifact in self.artifacts if artifact.collection == collection]
        same = [artifact for artifact in versions if artifact.digest == asked["digest"]]
        for other in versions:
            other.aliases = [alias for alias in other.aliases if alias not in aliases]
        if same:
            same[0].aliases += aliases
            return {"createArtifact": {"artifact": self._created(same[0])}}
        new = Artifact(
            len(self.artifacts),
            collection,
            asked["artifactTypeName"],
            asked["projectName"],
            len(versions),
            asked["digest"],
            asked.get("runName") or "",
            aliases,
            json.loads(asked.get("metadata") or "{}"),
        )
        self.artifacts.append(new)
        return {"createArtifact": {"artifact": self._created(new)}}

    def _created(self, artifact: Artifact) -> Any:
        return {"id": artifact.id, "state": artifact.state, "artifactSequence": {"latestArtifact": None}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> Any:
        (artifact,) = (each for each in self.artifacts if each.id == given["artifactID"])
        artifact.manifest = f"manifest/{artifact.number}"
        file = {"id": "file", "uploadUrl": f"{self.url}/put/{artifact.manifest}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifact.manifest, "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> Any:
        edges = []
        for asked in given["input"]["artifactFiles"]:
            digest = base64.b64encode(bytes.fromhex(asked["md5"])).decode() if len(asked["md5"]) == 32 else asked["md5"]
            node = {
                "storagePath": asked["name"],
                "uploadUrl": f"{self.url}/put/{_blob_path(digest)}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": asked["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> Any:
        (artifact,) = (each for each in self.artifacts if each.id == given["artifactID"])
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _UseArtifact(self, given: dict[str, Any]) -> Any:
        asked = given.get("input", given)  # wandb-core asks the one way, Python the other
        self.runs[asked["runName"]].used.append(asked["artifactID"])
        return {"useArtifact": {"artifact": {"id": asked["artifactID"]}}}

    def _ArtifactByID(self, given: dict[str, Any]) -> Any:
        (artifact,) = (each for each in self.artifacts if each.id == given["id"])
        return {"artifact": self._described(artifact)}

    def _ArtifactMembershipByName(self, given: dict[str, Any]) -> Any:
        name, _, alias = given["name"].partition(":")
        try:
            artifact = self.artifact(name, alias)
        except KeyError:
            return {"project": {"artifactCollectionMembership": None}}
        if artifact.project != given["project"]:
            return {"project": None}
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "membership",
            "versionIndex": artifact.version,
            "createdAt": "2026-01-01T00:00:00Z",
            "aliases": [{"__typename": "ArtifactAlias", "id": each, "alias": each} for each in artifact.aliases],
            "artifactCollection": self._collection(artifact),
            "artifact": self._described(artifact),
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def _collection(self, artifact: Artifact) -> dict[str, Any]:
        project = {"id": "project", "internalId": "UHJvamVjdDox", "name": artifact.project, "entity": {"name": ENTITY}}
        return {"__typename": "ArtifactSequence", "name": artifact.collection, "project": project}

    def _described(self, artifact: Artifact) -> dict[str, Any]:
        aliases = [
            {
                "artifactCollection": self._collection(artifact),
                "__typename": "ArtifactAlias",
                "id": each,
                "alias": each,
            }
            for each in artifact.aliases
        ]
        return {
            "__typename": "Artifact",
            "id": artifact.id,
            "artifactSequence": self._collection(artifact),
            "versionIndex": artifact.version,
            "artifactType": {"name": artifact.type},
            "description": None,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": artifact.state,
            "size": 1,
            "digest": artifact.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "0" * 20,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": aliases,
        }

    def _FetchArtifactManifest(self, given: dict[str, Any]) -> Any:
        (artifact,) = (each for each in self.artifacts if each.id == given["id"])
        return {"artifact": {"currentManifest": {"file": {"directUrl": f"{self.url}/put/{artifact.manifest}"}}}}

    def _ArtifactMembershipFiles(self, given: dict[str, Any]) -> Any:
        return self._GetArtifactMembershipFileUrls(given)

    def _GetArtifactMembershipFileUrls(self, given: dict[str, Any]) -> Any:
        artifact = self.artifact(given["collection"], given["alias"])
        contents = json.loads(self.files[artifact.manifest])["contents"]
        edges = [
            {
                "node": {
                    "__typename": "File",
                    "id": name,
                    "name": name,
                    "url": f"{self.url}/put/{_blob_path(entry['digest'])}",
                    "directUrl": f"{self.url}/put/{_blob_path(entry['digest'])}",
                    "sizeBytes": entry["size"],
                    "mimetype": None,
                    "updatedAt": None,
                    "digest": None,
                    "md5": None,
                }
            }
            for name, entry in contents.items()
        ]
        files = {"pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}, "edges": edges}
        return {
            "project": {
                "artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
            }
        }

    # ---- sweeps ----

    def _UpsertSweep(self, given: dict[str, Any]) -> Any:
        self.sweep |= {key: value for key, value in given.items() if value is not None}
        project = {"id": "project", "name": given["projectName"] or "p", "entity": {"id": "entity", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, given: dict[str, Any]) -> Any:
        sweep = {"id": "sweep1", "name": "sweep1", "config": self.sweep["config"], "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, given: dict[str, Any]) -> Any:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _Heartbeat(self, given: dict[str, Any]) -> Any:
        if json.loads(given["runState"] or "{}"):
            commands = []
        else:
            commands = [self.trials.pop()] if self.trials else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def stream(self, run: str, update: dict[str, Any]) -> None:
        """Store lines of a run's files."""
        with self._lock:
            for name, part in (update.get("files") or {}).items():
                lines = self.runs[run].lines.setdefault(name, {})
                lines |= {part.get("offset", 0) + i: line for i, line in enumerate(part["content"])}
            if update.get("complete") is not None or update.get("preempting"):
                self.runs[run].ends.append({key: value for key, value in update.items() if key != "files"})


def _blob_path(digest: str) -> str:
    return f"blob/{hashlib.sha256(digest.encode()).hexdigest()}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that have ended."""


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes | None:
        """Return the body; None if the request has been answered already."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        owner = self.owner
        if owner.mute.is_set():
            while owner.mute.is_set():
                time.sleep(0.05)
            self.close_connection = True
            return None
        if owner.status:
            self._reply(b"{}", owner.status)
            return None
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        parts = self.path.strip("/").split("/")
        if parts[0] == "graphql":
            if self.owner.rejects_key:
                self._reply(b'{"errors":[{"message":"permission denied"}]}', 401)
                return
            asked = json.loads(body)
            operation = asked.get("operationName") or asked["query"].replace("(", " ").split()[1]
            try:
                answer = {"data": self.owner.answer(operation, asked.get("variables") or {})}
                if answer["data"] is None:
                    answer["errors"] = [{"message": f"unknown: {operation}"}]
            except Exception as error:  # in a thread, where no test would see it
                answer = {"data": None, "errors": [{"message": f"{type(error).__name__}: {error}"}]}
                self.owner.failures.append(f"{operation}: {error!r} {asked.get('variables')}")
            self._reply(json.dumps(answer).encode())
        elif parts[-1] == "file_stream":
            self.owner.stream(parts[-2], json.loads(body))
            self._reply(json.dumps({"stopped": True} if self.owner.stops else {}).encode())
        else:
            self._reply(b"{}")

    def do_PUT(self) -> None:
        body = self._body()
        if body is not None and self.owner.refuses_files:
            self._reply(b"{}", 403)
        elif body is not None:
            self.owner.files[self.path.removeprefix("/put/")] = body
            self._reply(b"{}")

    def do_GET(self) -> None:
        if self._body() is None:
            return
        content = self.owner.files.get(self.path.removeprefix("/put/"))
        if content is None:
            self._reply(b"{}", 404)
        else:
            self._reply(content)
