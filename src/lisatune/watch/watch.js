// The page of lisatune watch: asks for what is new in the runs, keeps it, and draws it.

import {COLOURS, DASHES, chart, duration, figure, gib, h, map, number, parts, swatch, table, whole} from './draw.js'

const PERIOD = 2000, PERIOD_WHEN_ENDED = 15000, SLOWEST = 30000  // milliseconds between two questions
const SMOOTH = 0.9  // as in the reports
const CARDS = 4  // of more runs there is a table
const ENDED = ['finished', 'failed']

const runs = new Map()  // id to all that is known of a run
const hidden = new Set(), opened = new Set()  // what the reader chose
const chosen = {x: 'step', sample: new Map()}
const page = document.getElementById('page'), TITLE = document.title
let link = '', failures = 0, timer = null, asking = false, stale = false, held = false

// --- what is new

async function ask() {
  if (asking) return
  asking = true
  clearTimeout(timer)
  let wait
  try {
    const known = Object.fromEntries([...runs].map(([id, run]) => [id, run.known]))
    const response = await fetch(`news?known=${encodeURIComponent(JSON.stringify(known))}`, {signal: AbortSignal.timeout(60000)})
    if (!response.ok) throw new Error((await response.text()).trim())
    const news = await response.json()
    const changed = take(news)
    failures = 0
    const ended = runs.size > 0 && [...runs.values()].every(run => ENDED.includes(run.facts.state))
    wait = news.more ? 0 : ended ? PERIOD_WHEN_ENDED : PERIOD
    say('')
    stale ||= changed || !page.dataset.drawn
    if (stale && !inUse()) draw()
    else tellStates()
  } catch (error) {
    failures += 1
    wait = Math.min(SLOWEST, 1000 * 2 ** failures)
    say(`No answer (${error.message}). Asking again in ${wait / 1000} s; what is below is what came before.`)
  }
  asking = false
  if (!document.hidden) timer = setTimeout(ask, wait)
}

function take(news) {
  let changed = false
  const there = new Set(news.runs.map(one => one.id))
  for (const id of runs.keys()) if (!there.has(id)) changed = runs.delete(id)
  for (const one of news.runs) {
    const run = runs.get(one.id) ?? {rows: [], samples: [], facts: {}}
    changed ||= !runs.has(one.id) || one.rows != null || one.samples != null || one.facts != null || one.anew != null
    for (const name of one.anew ?? []) run[name] = []
    run.samples.push(...(one.samples ?? []))
    for (const row of one.rows ?? []) add(run, row)
    Object.assign(run, {id: one.id, name: one.name, known: one.known, age: one.age, facts: one.facts ?? run.facts, at: Date.now()})
    runs.set(one.id, run)
  }
  ;[...runs.values()].forEach((run, i) => Object.assign(run, {
    colour: COLOURS[i % COLOURS.length], dash: DASHES[Math.floor(i / COLOURS.length) % DASHES.length],
  }))
  return changed
}

// tokens and seconds since the beginning, and the running mean; a row stands for the steps since the one before
function add(run, row) {
  const before = run.rows.at(-1)
  const steps = row.step - (before?.step ?? row.step)
  row.sumTokens = (before?.sumTokens ?? 0) + steps * (row.tokens ?? 0)
  row.sumSeconds = (before?.sumSeconds ?? 0) + steps * (row.step_seconds ?? 0)
  const [total, weight] = before?.mean ?? [0, 0]
  row.mean = row.loss == null ? [total, weight] : [SMOOTH * total + row.loss, SMOOTH * weight + 1]
  run.rows.push(row)
}

function say(text) {
  link = text
  const line = document.getElementById('link')
  if (line) line.textContent = text
}

// what a reader drags, has selected or has open would be lost if the page were drawn again
const inUse = () => held || !getSelection().isCollapsed || document.activeElement?.tagName === 'SELECT'
const drawIfStale = () => stale && !inUse() && draw()
addEventListener('pointerdown', () => { held = true })
for (const end of ['pointerup', 'pointercancel', 'blur']) addEventListener(end, () => setTimeout(() => { held = false; drawIfStale() }))
document.addEventListener('selectionchange', drawIfStale)
document.addEventListener('focusout', () => setTimeout(drawIfStale))

document.addEventListener('visibilitychange', () => !document.hidden && ask())
addEventListener('online', ask)
addEventListener('resize', () => runs.size && draw())

// --- a run in numbers

const lastOf = (run, name) => run.rows.findLast(row => row[name] != null)?.[name]
const meanLoss = row => (row.mean[1] ? row.mean[0] / row.mean[1] : null)
const steps = run => run.facts.summary?.steps ?? run.facts.steps ?? run.rows[0]?.run?.steps
const step = run => run.rows.at(-1)?.step ?? 0
const plan = run => run.rows[0]?.plan
const base = run => run.facts.summary?.base_bytes ?? run.rows[0]?.process?.base_bytes ?? 0
const own = (run, bytes) => (bytes == null ? null : Math.max(0, bytes - base(run)))
const peak = run => run.facts.summary?.tensor_peak_bytes ?? own(run, run.facts.summary?.peak_bytes ?? lastOf(run, 'peak_bytes'))

function secondsOfStep(run) {
  const last = run.rows.slice(-50).map(row => row.step_seconds).filter(seconds => seconds != null)
  return last.length ? last.reduce((a, b) => a + b) / last.length : null
}

function speed(run) {
  const last = run.rows.slice(-20).filter(row => row.step_seconds)
  return last.length ? last.reduce((sum, row) => sum + row.tokens, 0) / last.reduce((sum, row) => sum + row.step_seconds, 0) : null
}

function state(run) {
  const {state, failure} = run.facts
  if (state === 'failed') return `failed: ${failure}`
  if (state === 'finished') return 'finished'
  if (state === 'waiting') return 'waiting for its turn'
  if (!run.rows.length) return 'starting'
  const quiet = run.age + (Date.now() - run.at) / 1000
  return quiet > Math.max(120, 20 * (secondsOfStep(run) ?? 0)) ? `no new step for ${duration(quiet)}` : 'training'
}

function timeOf(run) {
  if (run.facts.state === 'finished') return ['took', duration(run.facts.summary.train_seconds)]
  const seconds = secondsOfStep(run)
  return ['time left', steps(run) && seconds != null ? `about ${duration(Math.max(0, steps(run) - step(run)) * seconds)}` : '-']
}

function heldOut(run) {
  const with_ = run.rows.filter(row => row.eval)
  const names = Object.keys(with_.at(-1)?.eval ?? {})
  return names.map(name => [name ? `held out, ${name}` : 'held out',
    with_.length > 1 ? `${number(with_.at(-1).eval[name])}, was ${number(with_[0].eval[name])}` : number(with_[0].eval[name])])
}

const numbers = run => [
  ['step', steps(run) ? `${whole(step(run))} of ${whole(steps(run))}` : whole(step(run))],
  ['loss', run.rows.length ? number(meanLoss(run.rows.at(-1))) : '-'],
  ...heldOut(run),
  ['tokens a second', whole(speed(run))],
  timeOf(run),
  ['peak memory', gib(peak(run))],
  ['peak predicted', gib(plan(run)?.peak_bytes)],
]

// --- the page

const shownRuns = () => [...runs.values()].filter(run => !hidden.has(run.id))
const widthOf = () => Math.max(240, Math.min(608, page.clientWidth < 900 ? page.clientWidth : (page.clientWidth - 32) / 2))

function draw() {
  const some = shownRuns(), width = widthOf()
  const focus = document.activeElement?.dataset?.key, scrolled = [...page.querySelectorAll('.scroll')].map(one => one.scrollLeft)
  page.dataset.drawn = true
  stale = false
  if (!runs.size) return page.replaceChildren(h('p', {id: 'link', role: 'status'}, link), h('p', {}, 'No run has begun yet.'))
  page.replaceChildren(
    h('p', {id: 'link', role: 'status'}, link),
    ...(runs.size > 1 ? [chips()] : []),
    some.length <= CARDS ? h('div', {class: 'cards'}, some.map(card)) : summary(some),
    h('div', {class: 'figures'}, losses(some, width), scores(some, width), some.length === 1 && maps(some, width), memory(some),
      speeds(some, width), some.length > 1 && maps(some, width)),
    ...answers(some),
    ...differences(some),
    ...about(some),
  )
  document.title = some.length === 1 && steps(some[0]) ? `${percentDone(some[0])} ${some[0].name}` : TITLE
  page.querySelectorAll('.scroll').forEach((one, i) => { one.scrollLeft = scrolled[i] ?? 0 })
  if (focus) page.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus()
}

const share = run => (steps(run) ? Math.min(1, step(run) / steps(run)) : 0)
const percentDone = run => `${Math.floor(100 * share(run))}%`

const toggle = (set, key) => (set.has(key) ? set.delete(key) : set.add(key))

const chips = () => h('p', {class: 'chips'}, [...runs.values()].map(run => h('button', {
  type: 'button', 'data-key': run.id, 'aria-pressed': String(!hidden.has(run.id)), onclick: () => { toggle(hidden, run.id); draw() },
}, swatch(run.colour, run.dash), run.name)))

function card(run) {
  return h('section', {class: 'card'},
    h('h2', {}, swatch(run.colour, run.dash), run.name),
    h('p', {class: 'state', 'data-run': run.id}, state(run)),
    h('progress', {max: 1, value: share(run), 'aria-label': `steps of ${run.name}`}),
    h('dl', {}, numbers(run).map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))))
}

function summary(some) {
  const head = [...new Set(some.flatMap(run => numbers(run).map(([name]) => name)))]
  return table(['run', 'state', ...head], some.map(run => {
    const found = Object.fromEntries(numbers(run))
    return [h('span', {}, swatch(run.colour, run.dash), run.name), h('span', {'data-run': run.id}, state(run)), ...head.map(name => found[name] ?? '')]
  }))
}

// the time since the last step goes on when nothing else does
function tellStates() {
  for (const place of page.querySelectorAll('[data-run]')) place.textContent = state(runs.get(place.dataset.run))
}

// --- figures

const PLACES = {step: row => row.step, tokens: row => row.sumTokens, seconds: row => row.sumSeconds}
const nameOf = (some, run, what) => (some.length > 1 ? `${run.name}, ${what}` : what)

function losses(some, width) {
  const x = PLACES[chosen.x]
  const series = some.flatMap(run => {
    const train = run.rows.filter(row => row.loss != null)
    const evaluated = run.rows.filter(row => row.eval)
    const names = Object.keys(evaluated.at(-1)?.eval ?? {})
    return [
      {points: some.length > 1 ? [] : train.map(row => [x(row), row.loss]), colour: run.colour, faint: true},
      {name: nameOf(some, run, 'training'), points: train.map(row => [x(row), meanLoss(row)]), colour: run.colour, dash: run.dash},
      ...names.map((name, i) => ({
        name: nameOf(some, run, name ? `held out, ${name}` : 'held out'), marks: true, dash: some.length > 1 ? '4 3' : '',
        points: evaluated.filter(row => row.eval[name] != null).map(row => [x(row), row.eval[name]]),
        colour: some.length > 1 ? run.colour : COLOURS[1 + i],
      })),
    ]
  })
  const select = h('select', {'data-key': 'x', 'aria-label': 'over', onchange: event => { chosen.x = event.target.value; event.target.blur(); draw() }},
    Object.keys(PLACES).map(name => h('option', {selected: name === chosen.x}, name)))
  return figure('Loss', 'Nats per token; training as a running mean.', h('label', {class: 'over-what'}, 'over ', select),
    chart(width, {series, xlabel: chosen.x, label: `loss over ${chosen.x}`}))
}

function scores(some, width) {
  const series = some.flatMap(run => {
    const scored = run.rows.filter(row => row.scores && Object.keys(row.scores).length)
    const tasks = [...new Set(scored.flatMap(row => Object.keys(row.scores)))]
    return tasks.map((task, i) => ({
      name: nameOf(some, run, task), marks: true, colour: some.length > 1 ? run.colour : COLOURS[i % COLOURS.length], dash: DASHES[i % DASHES.length],
      points: scored.filter(row => row.scores[task] != null).map(row => [row.step, row.scores[task]]),
    }))
  })
  return series.length ? figure('Task scores', 'On a small sample, while training.', chart(width, {series, xlabel: 'step', label: 'task scores'})) : null
}

// which units there are, and which train in which step: slices, or decoder layers with what else is sampled
function trained(run) {
  const rows = run.rows.filter(row => row.active_layers || row.sampled_parts)
  const parts = [...new Set(rows.flatMap(row => row.sampled_parts ?? []))]
  const slices = parts.length > 0 && parts.every(name => name.startsWith('slices.'))
  const count = slices ? Number(run.facts.settings?.num_slices) || 1 + Math.max(...parts.map(name => Number(name.slice(7)))) : plan(run)?.num_layers
  const known = count ?? 1 + Math.max(0, ...rows.flatMap(row => row.active_layers ?? []))
  const layers = Array.from({length: Math.min(known, 1000)}, (_, i) => (slices ? `slices.${i}` : `layers.${i}`))
  const units = slices ? layers : [...layers, ...parts.sort()]
  const place = new Map(units.map((name, i) => [name, i]))
  const on = row => [...(slices ? [] : (row.active_layers ?? []).map(i => `layers.${i}`)), ...(row.sampled_parts ?? [])]
    .map(name => place.get(name)).filter(i => i != null)
  return {slices, units: units.map(name => name.replace(/^(layers|slices)\.(?=\d+$)/, '')), rows: rows.map(row => ({step: row.step, on: on(row)}))}
}

function maps(some, width) {
  return some.map(run => {
    const {slices, units, rows} = trained(run)
    if (!rows.length || !units.length) return null
    const what = slices ? 'slices of every matrix' : 'decoder layers'
    const title = some.length > 1 ? `What trained: ${run.name}` : 'What trained'
    return figure(title, `The ${what} by step, from the top; on the right the share of steps.`, map(width, {units, rows, label: `${what} that trained in ${run.name}`}))
  })
}

function memory(some) {
  const bars = some.filter(plan).map(run => ({
    name: some.length > 1 ? run.name : '', bytesOf: plan(run).bytes_of, total: plan(run).peak_bytes, mark: peak(run),
    told: `predicted ${gib(plan(run).peak_bytes)}, measured ${gib(peak(run))}`,
  }))
  const beside = some.some(run => base(run) > 0) ? ' Python and its libraries are not counted.' : ''
  return bars.length ? figure('Memory', `Peak by part as predicted, and what was measured so far.${beside}`, parts(bars)) : null
}

function speeds(some, width) {
  const series = some.map(run => {
    let mean = [0, 0]
    const points = run.rows.filter(row => row.step_seconds && row.tokens).map(row => {
      mean = [SMOOTH * mean[0] + row.tokens, SMOOTH * mean[1] + row.step_seconds]
      return [row.step, mean[0] / mean[1]]
    })
    return {name: nameOf(some, run, 'tokens a second'), points, colour: run.colour, dash: run.dash}
  })
  return figure('Speed', 'Tokens a second, running mean over the steps alone.',
    chart(width, {series, xlabel: 'step', label: 'tokens a second', zero: true, height: 180}))
}

// --- text

function details(key, title, ...inside) {
  return h('details', {open: opened.has(key), ontoggle: event => (event.target.open ? opened.add(key) : opened.delete(key))},
    h('summary', {'data-key': key}, title), ...inside)
}

function answers(some) {
  return some.flatMap(run => {
    const inside = run.samples.length ? sampled(run) : (run.facts.answers ?? []).map(one => asked(one.question, [['before', one.before], ['after', one.after]]))
    return inside.length ? [h('h2', {}, some.length > 1 ? `Answers: ${run.name}` : 'Answers'), ...inside] : []
  })
}

const asked = (prompt, told) => h('div', {class: 'asked'}, h('p', {}, prompt),
  told.map(([when, answer]) => h('div', {}, h('small', {}, when), h('p', {}, answer))))

function sampled(run) {
  const at = [...new Set(run.samples.map(one => one.step))].sort((a, b) => a - b)
  const prompts = [...new Set(run.samples.map(one => one.prompt))]
  const answer = (prompt, when) => run.samples.findLast(one => one.prompt === prompt && one.step === when)?.answer ?? '-'
  const now = () => (at.includes(chosen.sample.get(run.id)) ? chosen.sample.get(run.id) : at.at(-1))
  const told = h('div', {})
  const tell = () => told.replaceChildren(...prompts.map(prompt =>
    asked(prompt, [...new Set([at[0], now()])].map(when => [`step ${whole(when)}`, answer(prompt, when)]))))
  const slider = h('input', {
    type: 'range', min: 0, max: at.length - 1, value: at.indexOf(now()), 'data-key': `sample-${run.id}`,
    oninput: event => { chosen.sample.set(run.id, at[event.target.value]); tell() },
  })
  tell()
  return [at.length > 2 && h('p', {}, h('label', {}, 'answers at step ', slider)), told].filter(Boolean)
}

function differences(some) {
  if (some.length < 2) return []
  const names = [...new Set(some.flatMap(run => Object.keys(run.facts.settings ?? {})))].filter(name => name !== 'output')
  const rows = names.map(name => [name, ...some.map(run => run.facts.settings?.[name] ?? '')])
    .filter(([, ...values]) => new Set(values.filter(Boolean)).size > 1)
  return rows.length ? [h('h2', {}, 'Settings that differ'), table(['', ...some.map(run => run.name)], rows)] : []
}

function about(some) {
  return [h('h2', {}, 'Settings'), ...some.map(run => {
    const first = run.rows[0] ?? {}
    const lines = [['folder', run.facts.folder], ['model', first.layers], ...Object.entries(first.environment ?? {})].filter(([, value]) => value)
    return details(`about-${run.id}`, some.length > 1 ? run.name : 'The command and all settings',
      run.facts.command && command(run.facts.command), table(['', ''], lines),
      run.facts.config && h('pre', {}, run.facts.config))
  })]
}

function command(text) {
  const copy = event => navigator.clipboard.writeText(text).then(() => { event.target.textContent = 'Copied' })
  return h('div', {class: 'command'}, h('pre', {}, text),
    navigator.clipboard && h('button', {type: 'button', onclick: copy}, 'Copy'))
}

if (new URLSearchParams(location.search).has('token')) history.replaceState(null, '', location.pathname)  // a cookie holds it now
ask()
