// Shows /api/status, and asks again every second while the page is looked at.
"use strict";

const INTERVAL_MS = 1000;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

function bytes(count) {
  let unit = 0;
  while (count >= 1024 && unit < UNITS.length - 1) { count /= 1024; unit += 1; }
  return `${unit ? count.toFixed(1) : count} ${UNITS[unit]}`;
}

function duration(seconds) {
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function layer(image) {
  const flags = image["read-only"] ? ", read-only" : "";
  return element("li", `${image.filename} `,
    element("small", `${image.format}, ${bytes(image.size)}, node ${image["node-name"]}${flags}`));
}

function stream(status) {
  const share = status.length ? status.offset / status.length : 1;
  const bar = element("progress");
  bar.max = 1;
  bar.value = share;
  bar.setAttribute("aria-label", `stream ${status.job}`);
  const left = "seconds-left" in status ? `, ${duration(status["seconds-left"])} left` : "";
  const failed = status["io-status"] === "ok" ? "" : `, ${status["io-status"]}`;
  return element("div", "", bar, element("small",
    `stream ${status.status}${failed}: ${(share * 100).toFixed(1)} %, ${bytes(status.copied)} copied, ` +
    `${bytes(status.rate)}/s${left}`));
}

function device(disk) {
  const { read, write } = disk.guest;
  const shown = element("article", "", element("h2", disk.name || disk["node-name"]));
  if (disk.stream) shown.append(stream(disk.stream));
  shown.append(element("ol", "", ...disk.chain.map(layer)), element("small",
    `guests read ${bytes(read["byte-count"])} in ${read.count} requests, wrote ${bytes(write["byte-count"])} ` +
    `in ${write.count}; exports: ${disk.exports.join(", ") || "none"}`));
  return shown;
}

function job(entry) {
  const error = entry.error ? `: ${entry.error}` : "";
  return element("li", `${entry.id} (${entry.type}) ${entry.status}, ${bytes(entry.offset)} of ${bytes(entry.length)}${error}`);
}

function show(status) {
  const clients = status.nbd ? `, ${status.nbd.connections} NBD clients` : "";
  const line = document.getElementById("daemon");
  line.textContent = `${status.version}, up ${duration(status["uptime-seconds"])}${clients}`;
  line.className = "";
  document.getElementById("devices").replaceChildren(...status.devices.map(device));
  const jobs = document.getElementById("jobs");
  jobs.hidden = !status.jobs.length;
  jobs.querySelector("ul").replaceChildren(...status.jobs.map(job));
}

async function ask() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/api/status");
      show(await answer.json());
    } catch {
      const line = document.getElementById("daemon");
      line.textContent = "does not answer";
      line.className = "lost";
    }
  }
  setTimeout(ask, INTERVAL_MS);
}

ask();
