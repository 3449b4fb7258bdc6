// What scrolls can be reached by the keyboard, too.
addEventListener("load", () => setTimeout(() => {
  for (const frame of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code, .output")) {
    frame.tabIndex = 0;
  }
}));
