// The page of lisatune studio: a form, and what is done with it. All that it does is asked for by post(), below.

import {gib, h, number, parts, table, whole} from './draw.js'

const TOKEN = document.querySelector('meta[name=token]').content
const KEPT = 'lisatune studio'  // the form outlives a reload
const FIRST = ['model', 'data', 'method', 'learning_rate', 'max_steps', 'per_device_train_batch_size', 'max_length', 'eval_rows', 'samples']
const PERIOD = 2000  // milliseconds between two questions how the runs are
const byId = id => document.getElementById(id)

const form = {name: 'first', settings: {}, device: 'cuda', memory: '', ...kept()}
const chats = {base: [], trained: []}
let options, before = null, timer = null, runs = []

function kept() {
  try { return JSON.parse(localStorage.getItem(KEPT)) } catch { return {} }
}

async function post(deed, asked = {}) {
  const response = await fetch(`studio/${deed}`, {
    method: 'POST', headers: {'Content-Type': 'application/json', 'X-Lisatune-Token': TOKEN}, body: JSON.stringify(asked),
  })
  const text = await response.text()
  if (response.ok) return JSON.parse(text)
  throw new Error(response.status === 422 ? JSON.parse(text).error : text.trim())
}

// --- a deed: what it says while it goes on, and why it could not be done

async function doing(place, text, work) {
  place.replaceChildren(h('p', {class: 'doing', role: 'status'}, text))
  try {
    place.replaceChildren(...[await work()].flat().filter(Boolean))
  } catch (error) {
    place.replaceChildren(h('p', {class: 'wrong', role: 'alert'}, error.message))
  }
}

const button = (id, text, onclick) => h('button', {type: 'button', id, class: 'deed', onclick}, text)

// --- the form

function field(setting) {
  const {name, help, values} = setting
  const id = `set-${name}`, value = form.settings[name] ?? ''
  const oninput = event => { form.settings[name] = event.target.value; changed() }
  const input = setting.choices.length
    ? h('select', {id, oninput}, h('option', {value: ''}, `${setting.default} (default)`),
      setting.choices.filter(one => one !== setting.default).map(one => h('option', {value: one, selected: one === value}, one)))
    : h('input', {id, value, oninput, list: {model: 'models', data: 'datas'}[name], placeholder: setting.default, spellcheck: 'false', autocomplete: 'off'})
  return h('div', {class: 'field', 'data-words': `${name} ${help}`.toLowerCase()},
    h('label', {for: id}, name), input, h('small', {}, setting.choices.length ? help : `${help} (${values})`))
}

const list = (id, names) => h('datalist', {id}, names.map(name => h('option', {value: name})))

function drawForm() {
  const first = FIRST.map(name => options.settings.find(one => one.name === name)).filter(Boolean)
  const others = options.settings.filter(one => !FIRST.includes(one.name))
  const groups = [...new Set(others.map(one => one.group))]
  const search = event => {
    const word = event.target.value.toLowerCase()
    for (const one of byId('others').querySelectorAll('.field')) one.hidden = !one.dataset.words.includes(word)
    for (const one of byId('others').querySelectorAll('details')) one.open = word !== '' && one.querySelector('.field:not([hidden])') != null
  }
  byId('rows').replaceChildren(
    list('models', options.models), list('datas', options.data),
    h('div', {class: 'fields'},
      h('div', {class: 'field'}, h('label', {for: 'name'}, 'name'),
        h('input', {id: 'name', value: form.name, oninput: event => { form.name = event.target.value; changed() }}), h('small', {}, 'Name of the run: its folder in runs.')),
      first.map(field)),
    h('h2', {}, 'Other settings'),
    h('p', {}, h('input', {type: 'search', 'aria-label': 'search the settings', placeholder: 'search', oninput: search})),
    h('div', {id: 'others'}, groups.map(group => h('details', {}, h('summary', {}, group),
      h('div', {class: 'fields'}, others.filter(one => one.group === group).map(field))))),
    h('h2', {}, 'What the rows become'),
    h('p', {}, button('show-rows', 'Show the rows', () => doing(byId('found-rows'), 'Reading the rows ...', showRows))),
    h('div', {id: 'found-rows'}),
  )
}

const asked = () => ({name: form.name, settings: form.settings})

function changed() {
  localStorage.setItem(KEPT, JSON.stringify(form))
  clearTimeout(timer)
  timer = setTimeout(check, 300)
}

let checks = 0
async function check() {
  const mine = ++checks
  let told
  try {
    const {config, command} = await post('check', asked())
    told = [h('pre', {}, config), h('pre', {}, command)]
  } catch (error) {
    told = [h('p', {class: 'wrong', role: 'alert'}, error.message)]
  }
  if (mine !== checks) return  // the form has changed since
  const ready = told.length === 2
  byId('deed').replaceChildren(h('h2', {}, ready ? 'What this is: a file and a command' : 'Not yet'), ...told, h('div', {id: 'begun'}),
    ...(ready ? [h('p', {}, button('begin', 'Begin the run', () => doing(byId('begun'), 'Beginning ...', begin)))] : []))
  if (ready && !byId('memory').hidden) plan()
}

async function showRows() {
  const found = await post('rows', asked())
  const {counts, lengths} = found
  const reasons = Object.entries(counts.reasons).map(([reason, count]) => [`refused: ${reason}`, whole(count)])
  return [
    table(['rows', ''], [['used', whole(counts.used)], ...reasons, ['tokens', whole(counts.tokens)], ['learned', whole(counts.labelled_tokens)],
      ['cut at max_length', whole(counts.truncated)], ['longest row', `${whole(lengths.longest)} of ${whole(lengths.max_length)} tokens`]]),
    h('p', {}, 'What is learned is ', h('mark', {}, 'marked'), '.'),
    h('div', {class: 'found'}, found.rows.map(row => h('div', {class: 'row'}, h('small', {}, row.where),
      h('pre', {}, row.pieces.map(([text, learnt]) => (learnt ? h('mark', {}, text) : text)))))),
  ]
}

// --- memory

function drawMemory() {
  const set = name => event => { form[name] = event.target.value; changed() }
  byId('memory').replaceChildren(
    h('div', {class: 'fields'},
      h('div', {class: 'field'}, h('label', {for: 'device'}, 'device'),
        h('select', {id: 'device', oninput: set('device')}, ['cuda', 'cpu'].map(one => h('option', {selected: one === form.device}, one))), h('small', {}, 'Where the run would compute.')),
      h('div', {class: 'field'}, h('label', {for: 'there-is'}, 'memory'),
        h('input', {id: 'there-is', value: form.memory, placeholder: '24GiB', oninput: set('memory')}), h('small', {}, 'What the card has: settings that fit are looked for.'))),
    h('p', {}, 'The bars follow the settings of the first tab.'), h('div', {id: 'bars'}), h('div', {id: 'planned'}))
}

let planning = false, again = false
async function plan() {
  if (planning) { again = true; return }
  planning = true
  await doing(byId('planned'), 'Forecasting ...', async () => {
    const {plan, budget, fitted, levers, reach} = await post('plan', {...asked(), device: form.device, memory: form.memory})
    const bar = (name, one) => ({name, bytesOf: one.bytes_of, total: one.peak_bytes, told: gib(one.peak_bytes) + (one.host_bytes ? ` and ${gib(one.host_bytes)} in the host` : '')})
    const bars = [bar('these settings', plan), ...(levers ? [bar(levers, fitted)] : []), ...(before && before.peak_bytes !== plan.peak_bytes ? [bar('before', before)] : [])]
    byId('bars').replaceChildren(parts(bars, {budget: budget ?? 0}))
    before = plan
    const use = () => {
      for (const word of levers.split(' ')) form.settings[word.split('=')[0]] = word.split('=').slice(1).join('=')
      drawForm()
      changed()
    }
    return [
      h('p', {}, `Trains ${whole(plan.num_trained)} of ${whole(plan.num_parameters)} parameters at a time. The peak is ${plan.peak_at}.`),
      levers && h('p', {}, button('use-levers', 'Use what fits', use)),
      Object.keys(reach).length > 0 && table(['at most, each by itself', ''], Object.entries(reach).map(([name, value]) => [name, whole(value)])),
    ]
  })
  planning = false
  if (again) { again = false; plan() }
}

// --- runs

async function begin() {
  const {command} = await post('train', asked())
  openTab('run')
  await showRuns()
  return h('p', {role: 'status'}, `Begun: ${command}`)
}

async function showRuns() {
  runs = (await post('state')).runs
  const open = new Set([...byId('runs').querySelectorAll('details[open]')].map(one => one.dataset.run))
  const deed = (run, what) => button(`${what}-${run.name}`, what, () => doing(byId(`told-${run.name}`), '...', async () => { await post(what, {run: run.name}); await showRuns() }))
  byId('runs').replaceChildren(...(runs.length ? runs : [{}]).map(run => run.name == null ? h('p', {class: 'none'}, 'No run yet. Fill in the first tab, and begin.') :
    h('div', {class: 'run'}, h('b', {}, run.name), ` ${run.state} `,
      run.state === 'trains' && deed(run, 'stop'), run.state === 'stopped' && deed(run, 'resume'), h('span', {id: `told-${run.name}`}),
      run.log && h('details', {'data-run': run.name, open: open.has(run.name) || run.state === 'failed'}, h('summary', {}, 'what it says'), h('pre', {}, run.log)))))
  drawTrained()
}

setInterval(() => { if (!document.hidden && !byId('run').hidden) showRuns().catch(() => {}) }, PERIOD)

// --- the trained model

// lists of runs are made again only when there are others
function drawTrained() {
  const finished = runs.filter(run => run.state === 'finished').map(run => run.name)
  for (const select of document.querySelectorAll('select.runs')) {
    if (select.id === 'chat-run') setTimeout(() => byId('chat-command').replaceChildren(select.value ? `lisatune chat runs/${select.value}` : 'No run has ended yet.'))
    if ([...select.options].map(one => one.value).join() !== finished.join()) select.replaceChildren(...finished.map(name => h('option', {}, name)))
  }
}

function drawChat() {
  const side = name => h('div', {}, h('h2', {}, name === 'base' ? 'Before: the base model' : 'After: the trained model'), h('div', {id: `said-${name}`, 'aria-live': 'polite'}))
  byId('chat').replaceChildren(
    h('p', {}, h('label', {}, 'run ', h('select', {class: 'runs', id: 'chat-run', oninput: forget}))),
    h('pre', {id: 'chat-command'}),
    h('div', {class: 'sides'}, side('base'), side('trained')),
    h('form', {onsubmit: event => { event.preventDefault(); say(event.target.elements.question) }},
      h('textarea', {name: 'question', id: 'question', rows: 2, required: true, placeholder: 'Ask both'}),
      h('p', {}, h('button', {id: 'ask', class: 'deed'}, 'Ask'), ' ', button('forget', 'Begin again', forget))))
}

function forget() {
  for (const name of ['base', 'trained']) { chats[name] = []; byId(`said-${name}`).replaceChildren() }
}

async function say(input) {
  const question = input.value.trim(), run = byId('chat-run').value
  if (!question) return
  input.value = ''
  await Promise.all(['base', 'trained'].map(async name => {
    const messages = [...chats[name], {role: 'user', content: question}], place = h('div', {class: 'answer'})
    byId(`said-${name}`).append(h('p', {class: 'question'}, question), place)
    await doing(place, 'Thinking ...', async () => {
      const {answer} = await post('chat', {run, base: name === 'base', messages})
      chats[name] = [...messages, {role: 'assistant', content: answer}]
      return h('p', {}, answer || '(nothing)')
    })
  }))
}

function drawExport() {
  byId('export').replaceChildren(
    h('div', {class: 'fields'},
      h('div', {class: 'field'}, h('label', {for: 'export-run'}, 'run'), h('select', {class: 'runs', id: 'export-run'})),
      h('div', {class: 'field'}, h('label', {for: 'export-form'}, 'form'), h('select', {id: 'export-form'}, options.forms.map(one => h('option', {}, one))),
        h('small', {}, 'A folder, one in bfloat16, what has changed alone, or a GGUF file of a type.')),
      h('div', {class: 'field'}, h('label', {for: 'export-name'}, 'name'), h('input', {id: 'export-name', value: 'my-model'}), h('small', {}, 'Of what is made, in exports.'))),
    h('p', {}, button('do-export', 'Export', () => doing(byId('exported'), 'Exporting ...', async () => {
      const {command, told} = await post('export', {run: byId('export-run').value, form: byId('export-form').value, name: byId('export-name').value})
      return [h('pre', {}, command), table(['', ''], Object.entries(told).map(([name, value]) => [name, name === 'bytes' ? gib(value) : typeof value === 'number' ? number(value) : String(value)]))]
    }))), h('div', {id: 'exported'}))
}

// --- tabs

const tabs = [...document.querySelectorAll('[role=tab]')]

function openTab(name) {
  for (const tab of tabs) {
    const mine = tab.id === `tab-${name}`
    tab.setAttribute('aria-selected', String(mine))
    tab.tabIndex = mine ? 0 : -1
    byId(tab.getAttribute('aria-controls')).hidden = !mine
  }
  byId('deed').hidden = ['chat', 'export'].includes(name)
  dispatchEvent(new Event('resize'))  // what was hidden had no width
  if (name === 'memory') plan()
  if (['run', 'chat', 'export'].includes(name)) showRuns()
}

tabs.forEach((tab, i) => {
  tab.addEventListener('click', () => openTab(tab.id.slice(4)))
  tab.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key]
    const next = step && tabs[(i + step + tabs.length) % tabs.length]
    if (next) { next.focus(); next.click() }
  })
})

options = await post('options')
drawForm()
drawMemory()
drawChat()
drawExport()
openTab('rows')
check()
document.body.dataset.ready = true
