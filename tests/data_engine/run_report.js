// Runs the script of a report over two articles: marks the second, downloads the list, prints what happened.
const page = require("fs").readFileSync(process.argv[2], "utf-8");
const script = page.slice(page.indexOf("<script>") + 8, page.indexOf("</script>"));
const listeners = {}, classes = {}, store = {};
const given = ["a:detail", "b:complex"].map(id => {
  const input = {checked: false, addEventListener: (_, f) => listeners[id] = f};
  return {dataset: {id, type: id.slice(2)}, classList: {toggle: (_, on) => classes[id] = on}, querySelector: () => input};
});
const count = {}, save = {addEventListener: (_, f) => listeners.save = f};
const link = {click: () => null};
global.document = {
  querySelectorAll: q => q === "article" ? given : [],
  getElementById: id => id === "count" ? count : save,
  createElement: () => link,
};
global.localStorage = {getItem: k => store[k] ?? null, setItem: (k, v) => store[k] = v};
let saved;
global.Blob = class { constructor(parts) { saved = parts[0]; } };
global.URL.createObjectURL = () => "blob:";
global.URL.revokeObjectURL = () => null;
eval(script);
listeners["b:complex"]({target: {checked: true}});
listeners.save();
console.log(JSON.stringify({count: count.textContent, classes, saved: JSON.parse(saved), name: link.download}));
