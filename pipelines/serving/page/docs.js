// Shows openapi.json. All that it holds is put in as text.
"use strict";

const el = (tag, text, ...inside) => { const made = document.createElement(tag); if (text) made.textContent = text; made.append(...inside); return made; };

function typed(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.anyOf) return schema.anyOf.map(typed).join(" or ");
  if (schema.type === "array") return `list of ${typed(schema.items)}`;
  if (schema.type === "object" && schema.additionalProperties) return `object of ${typed(schema.additionalProperties)}`;
  return schema.type || "anything";
}

function fields(schema, all) {
  const found = schema?.$ref ? all[schema.$ref.split("/").pop()] : schema;
  if (!found?.properties) return [];
  const needed = new Set(found.required || []);
  const rows = Object.entries(found.properties).map(([name, one]) => {
    const said = "default" in one && one.default !== null ? ` (default ${JSON.stringify(one.default)})` : "";
    return el("tr", "", el("td", "", el("code", name)), el("td", typed(one) + (needed.has(name) ? ", needed" : "")), el("td", (one.description || "") + said));
  });
  const head = el("tr", "", el("th", "field"), el("th", "type"), el("th", "meaning"));
  return [el("table", "", el("thead", "", head), el("tbody", "", ...rows))];
}

fetch("/v1/openapi.json").then((reply) => reply.json()).then((api) => {
  document.getElementById("about").textContent = api.info.description;
  const all = api.components?.schemas || {};
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, route] of Object.entries(methods)) {
    const body = route.requestBody?.content?.["application/json"]?.schema;
    const reply = route.responses?.["200"]?.content?.["application/json"]?.schema;
    const parts = [el("h2", "", el("code", `${method.toUpperCase()} ${path}`), ` ${route.summary || ""}`)];
    if (route.description) parts.push(el("p", route.description));
    if (body) parts.push(el("p", "Body:"), ...fields(body, all));
    for (const one of route.parameters || []) parts.push(el("p", `${one.in} parameter ${one.name}: ${typed(one.schema)}`));
    if (fields(reply, all).length) parts.push(el("p", "Answer:"), ...fields(reply, all));
    document.getElementById("routes").append(el("article", "", ...parts));
  }
});
