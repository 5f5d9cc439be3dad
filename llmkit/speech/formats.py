"""Transcripts as subtitles. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmkit.protocol.speech import Segment

__all__ = ["clock", "srt", "text_of", "vtt"]


def text_of(segments: Iterable[Segment]) -> str:
    """All that was said."""
    return "".join(segment.text for segment in segments).strip()


def clock(seconds: float, point: str = ".") -> str:
    """A time as subtitles write it.

    >>> clock(3661.5), clock(0.0625, ",")
    ('01:01:01.500', '00:00:00,062')
    """
    ms = round(seconds * 1000)
    hours, ms = divmod(ms, 3_600_000)
    minutes, ms = divmod(ms, 60_000)
    return f"{hours:02}:{minutes:02}:{ms // 1000:02}{point}{ms % 1000:03}"


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered, with commas in the times."""
    return "".join(
        f"{i}\n{clock(s.start, ',')} --> {clock(s.end, ',')}\n{_line(s)}\n\n"
        for i, s in enumerate(segments, 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT."""
    cues = (f"{clock(s.start)} --> {clock(s.end)}\n{_cue(s)}\n\n" for s in segments)
    return "WEBVTT\n\n" + "".join(cues)


def _line(segment: Segment) -> str:
    """In one line: an empty one would end a cue, and an arrow would begin another."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _cue(segment: Segment) -> str:
    return _line(segment).replace("&", "&amp;").replace("<", "&lt;")
