// Shows in the title of our accordion which techniques are on, so that a closed one does not hide them, and at a closed
// technique what it is for: opening it would switch it on.
(function() {
    function titleSpan(accordion) {
        return accordion.querySelector(":scope > .label-wrap > span, :scope > * > .label-wrap > span, .label-wrap > span");
    }

    // the accordion's own words, without the checkbox and the mark that are put into it
    function ownText(span) {
        return Array.from(span.childNodes)
            .filter(node => node.nodeType === Node.TEXT_NODE)
            .map(node => node.textContent.trim())
            .join("");
    }

    function techniquesOn(panel) {
        return Array.from(panel.querySelectorAll(".input-accordion"))
            .filter(section => section.querySelector(".input-accordion-checkbox")?.checked)
            .map(section => ownText(titleSpan(section)).replace(/ \([^()]*\)$/, "")); // without its cost
    }

    function explain(section) {
        const summary = section.querySelector(".hires-plus-summary");
        if (summary) section.querySelector(".label-wrap").title = summary.textContent;
    }

    function showTechniquesOn(panel) {
        const title = titleSpan(panel);
        if (!title) return;
        let mark = title.querySelector(".hires-plus-techniques-on");
        if (!mark) {
            mark = document.createElement("span");
            mark.className = "hires-plus-techniques-on";
            title.appendChild(mark);
        }
        const names = techniquesOn(panel).join(", ");
        if (mark.textContent !== names) mark.textContent = names;
    }

    function follow(panel) {
        if (panel.dataset.hiresPlusFollowed) return;
        panel.dataset.hiresPlusFollowed = "yes";
        const show = () => showTechniquesOn(panel);
        // a click on the checkbox, and the host opening or closing a section after a paste
        panel.addEventListener("input", () => setTimeout(show, 0));
        const opened = new MutationObserver(show);
        for (const section of panel.querySelectorAll(".input-accordion")) {
            const label = section.querySelector(".label-wrap");
            if (!label) continue;
            opened.observe(label, {attributes: true, attributeFilter: ["class"]});
            explain(section);
        }
        show();
    }

    if (typeof onUiLoaded === "function") {
        // after the host has put the checkboxes into the sections' titles
        onUiLoaded(() => setTimeout(() => gradioApp().querySelectorAll(".hires-plus").forEach(follow), 0));
    }
})();
