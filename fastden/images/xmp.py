"""XMP packets: joining, splitting for JPEG, and removing properties of data that the result does not hold."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from fastden.images.containers import SEGMENT

#: First bytes of a JPEG's segments with the packet, and with its continuation.
MAIN, EXTENSION = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"

#: Elements in elements of a packet that is changed; a deeper one stays as it is. Sound ones have about ten.
_DEEPEST = 100
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_NOTE = "http://ns.adobe.com/xmp/note/"
# All properties of these namespaces describe a second picture, a video or a depth map behind the picture.
_DESCRIBE_OTHERS = (
    "http://ns.adobe.com/hdr-gain-map/1.0/",
    "http://ns.google.com/photos/1.0/container/",
    "http://ns.google.com/photos/1.0/container/item/",
    "http://ns.google.com/photos/dd/1.0/",
    "http://ns.apple.com/HDRGainMap/1.0/",
    "http://ns.apple.com/pixeldatainfo/1.0/",
)
_CAMERA = "http://ns.google.com/photos/1.0/camera/"
_OF_CAMERA = ("MotionPhoto", "MicroVideo")


def joined(main: bytes, extensions: list[bytes]) -> tuple[bytes, bool]:
    """The packet of a JPEG with what its further segments hold, and whether all of it was there.

    Args:
        main: of the first segment.
        extensions: what follows the name in the others.
    """
    packet = _parsed(main)
    if packet is None:
        return main, not extensions
    guid = _extended_guid(packet)
    if guid is None:
        return main, not extensions
    extended = _assembled(guid, extensions)
    rest = None if extended is None else _parsed(extended)
    target = _rdf(packet)
    if rest is not None and target is not None:
        for description in _descriptions(rest):
            target.appendChild(packet.importNode(description, True))
    # The packet must not point at missing data.
    _drop(packet, lambda space, name: space == _NOTE and name == "HasExtendedXMP")
    return _text(packet, main), rest is not None


def _assembled(guid: str, extensions: list[bytes]) -> bytes | None:
    """The continuation of that name, whole, or None."""
    whole: bytearray | None = None
    missing = 0
    for part in extensions:
        if len(part) < 40 or part[:32].decode("latin-1").upper() != guid.upper():
            continue
        size, offset = struct.unpack(">II", part[32:40])
        if whole is None:
            if size > sum(map(len, extensions)):
                return None
            whole, missing = bytearray(size), size
        whole[offset : offset + len(part) - 40] = part[40:]
        missing -= len(part) - 40
    return bytes(whole) if whole is not None and missing == 0 and _digest(whole) == guid.upper() else None


def _digest(data: bytes | bytearray) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest().upper()


def split(packet: bytes) -> list[bytes] | None:
    """The segments of a JPEG for a packet of any size; None where it cannot be split."""
    if len(MAIN) + len(packet) <= SEGMENT:
        return [MAIN + packet]
    document = _parsed(packet)
    target = None if document is None else _rdf(document)
    if document is None or target is None:
        return None
    # The largest properties go into the continuation, which fewer programs read.
    rest = minidom.parseString(f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"/></x:xmpmeta>')
    element = _rdf(rest)
    assert element is not None
    properties = [(node, child) for node in _descriptions(document) for child in _elements(node)]
    properties.sort(key=lambda pair: len(pair[1].toxml()), reverse=True)
    size = len(_text(document, packet).rstrip())
    for parent, child in properties:
        if size <= SEGMENT - len(MAIN) - 1000:  # a description and the continuation's name come on top
            break
        size -= len(child.toxml().encode())
        description = rest.importNode(parent, False)
        description.appendChild(rest.importNode(child, True))
        element.appendChild(description)
        parent.removeChild(child)
    # Attributes of the copied parents would be in both parts: the continuation drops them.
    for description in _descriptions(rest):
        for attribute in list(description.attributes.values()):
            if not attribute.name.startswith("xmlns") and attribute.name != "rdf:about":
                description.removeAttributeNode(attribute)
    extended = _root(rest).toxml().encode()
    note = document.createElement("rdf:Description")
    note.setAttribute("rdf:about", "")
    note.setAttribute("xmlns:xmpNote", _NOTE)
    note.setAttribute("xmpNote:HasExtendedXMP", _digest(extended))
    target.appendChild(note)
    main = MAIN + _root(document).toxml().encode()
    if len(main) > SEGMENT:
        return None
    head = EXTENSION + _digest(extended).encode()
    step = SEGMENT - len(head) - 8
    parts = [
        head + struct.pack(">II", len(extended), start) + extended[start : start + step]
        for start in range(0, len(extended), step)
    ]
    return [main, *parts]


def freed(packet: bytes, *, upright: bool) -> bytes:
    """A packet without what describes pictures, videos and depth maps that are not copied.

    Args:
        packet: of the source.
        upright: the pixels are turned already: the packet must not hold another orientation.
    """
    suspicious = any(name.encode() in packet for name in (*_DESCRIBE_OTHERS, *_OF_CAMERA, "HasExtendedXMP"))
    if upright:
        packet = re.sub(rb'(tiff:Orientation(?:="|>))[2-8]', rb"\g<1>1", packet)
    if not suspicious:
        return packet
    document = _parsed(packet)
    if document is None:
        return packet

    def describes_others(space: str, name: str) -> bool:
        of_camera = space == _CAMERA and name.startswith(_OF_CAMERA)
        return of_camera or space.startswith(_DESCRIBE_OTHERS) or (space == _NOTE and name == "HasExtendedXMP")

    if not _drop(document, describes_others):
        return packet
    return _undeclared(_text(document, packet))


def _undeclared(packet: bytes) -> bytes:
    """Remove unused declarations of namespaces, which would still look like the removed properties."""
    for declaration, prefix, space in re.findall(rb'(\s+xmlns:([\w.-]+)="([^"]*)")', packet):
        if space.startswith(tuple(name.encode() for name in _DESCRIBE_OTHERS)):
            used = re.search(rb"[<\s/]" + re.escape(prefix) + rb":", packet)
            packet = packet if used else packet.replace(declaration, b"")
    return packet


def _parsed(packet: bytes) -> minidom.Document | None:
    # Entities could make a small packet large.
    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        return None
    start, end = packet.find(b"<x:xmpmeta"), packet.rfind(b"</x:xmpmeta>")
    if start < 0 or end < 0:
        start, end = packet.find(b"<rdf:RDF"), packet.rfind(b"</rdf:RDF>")
    stop = packet.find(b">", end) + 1
    try:
        document = minidom.parseString(packet[start:stop]) if 0 <= start < end < stop else None
    except (ExpatError, ValueError):
        return None
    # minidom copies and writes an element in an element by calling itself: some hundred are too many for Python.
    level: list[minidom.Element] = [] if document is None else [_root(document)]
    for _ in range(_DEEPEST):
        level = [child for element in level for child in _elements(element)]
    return None if level else document


def _text(document: minidom.Document, packet: bytes) -> bytes:
    """The packet with the document in place of what was parsed, wrapped as it was."""
    body = _root(document).toxml().encode()
    tag = body[1:].split(None, 1)[0].split(b">")[0]
    start, end = packet.find(b"<" + tag), packet.rfind(b"</" + tag + b">")
    return packet[:start] + body + packet[end + len(tag) + 3 :]


def _extended_guid(document: minidom.Document) -> str | None:
    for description in _descriptions(document):
        if description.hasAttributeNS(_NOTE, "HasExtendedXMP"):
            return description.getAttributeNS(_NOTE, "HasExtendedXMP").strip()
        for child in description.getElementsByTagNameNS(_NOTE, "HasExtendedXMP"):
            return "".join(node.data for node in child.childNodes if node.nodeType == node.TEXT_NODE).strip()
    return None


def _root(document: minidom.Document) -> minidom.Element:
    root = document.documentElement
    assert root is not None  # of a document that was parsed
    return root


def _rdf(document: minidom.Document) -> minidom.Element | None:
    return next(iter(document.getElementsByTagNameNS(_RDF, "RDF")), None)


def _descriptions(document: minidom.Document) -> list[minidom.Element]:
    top = _rdf(document)
    return [] if top is None else [node for node in _elements(top) if node.namespaceURI == _RDF]


def _elements(node: minidom.Element) -> Iterator[minidom.Element]:
    return (child for child in list(node.childNodes) if child.nodeType == child.ELEMENT_NODE)


def _drop(document: minidom.Document, wanted: Callable[[str, str], bool]) -> bool:
    """Remove the properties that ``wanted`` selects by namespace and name; whether there were any."""
    dropped = False
    for description in _descriptions(document):
        for attribute in list(description.attributes.values()):
            if attribute.namespaceURI and wanted(attribute.namespaceURI, attribute.localName):
                description.removeAttributeNode(attribute)
                dropped = True
        for child in _elements(description):
            if wanted(child.namespaceURI or "", child.localName):
                description.removeChild(child)
                dropped = True
    return dropped
