"""A verdict as JUnit XML, in which CI systems list single checks: one test case for each check.

One <testsuites> with one <testsuite>; a failed check has a <failure>; notes are the suite's <system-out>. Names and
sentences can hold a path or a task's name, so control characters are replaced: XML does not allow them.
"""

from xml.etree import ElementTree

from ..core.record.verdict import Verdict
from .gate_card import clean


def junit(verdict: Verdict) -> bytes:
    """The XML document, UTF-8."""
    counts = {"tests": str(len(verdict.checks)), "failures": str(len(verdict.failed)), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": "onecard gate", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": clean(f"onecard gate {verdict.report}"), **counts})
    for check in verdict.checks:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"onecard.gate.{check.kind}", "name": clean(check.name), "time": "0"}
        )
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = clean(check.said)
        else:
            failure = ElementTree.SubElement(case, "failure", {"message": clean(check.said), "type": str(check.kind)})
            failure.text = clean(check.said)
    if verdict.notes:
        ElementTree.SubElement(suite, "system-out").text = clean("\n".join(verdict.notes))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"
