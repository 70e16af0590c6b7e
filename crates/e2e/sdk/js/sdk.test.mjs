// The official JavaScript SDK: one test for each part of what it does.
import assert from 'node:assert/strict'
import { test } from 'node:test'

import { CommandExitError, FilesystemEventType, NotFoundError, Sandbox, TimeoutError } from 'e2b'

async function withSandbox(work, options = {}) {
  const sandbox = await Sandbox.create('base', { timeoutMs: 120_000, ...options })
  try {
    await work(sandbox)
  } finally {
    await sandbox.kill()
  }
}

test('a life', () =>
  withSandbox(
    async (sandbox) => {
      assert.ok(await sandbox.isRunning())
      const info = await sandbox.getInfo()
      assert.equal(info.metadata.kind, 'js')
      const same = await Sandbox.connect(sandbox.sandboxId)
      assert.equal((await same.commands.run('echo $GREETING')).stdout, 'hello\n')
      const listed = await Sandbox.list({ query: { metadata: { kind: 'js' } } }).nextItems()
      assert.deepEqual(listed.map((item) => item.sandboxId), [sandbox.sandboxId])
      assert.ok(await same.kill())
      assert.ok(!(await sandbox.isRunning()))
      await assert.rejects(Sandbox.connect(sandbox.sandboxId), NotFoundError)
    },
    { metadata: { kind: 'js' }, envs: { GREETING: 'hello' } }
  ))

test('commands', () =>
  withSandbox(async (sandbox) => {
    await assert.rejects(sandbox.commands.run('exit 5'), (error) => error instanceof CommandExitError && error.exitCode === 5)
    await assert.rejects(sandbox.commands.run('sleep 60', { timeoutMs: 1000 }), TimeoutError)
    const handle = await sandbox.commands.run('cat', { background: true, stdin: true })
    await sandbox.commands.sendStdin(handle.pid, 'fed')
    await sandbox.commands.closeStdin(handle.pid)
    assert.equal((await handle.wait()).stdout, 'fed')
    assert.equal((await sandbox.commands.run('whoami', { user: 'root' })).stdout, 'root\n')
  }))

test('a terminal', () =>
  withSandbox(async (sandbox) => {
    let seen = ''
    const decoder = new TextDecoder()
    const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData: (data) => (seen += decoder.decode(data)) })
    await sandbox.pty.resize(terminal.pid, { cols: 99, rows: 24 })
    await sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode('tput cols; exit\n'))
    await terminal.wait()
    assert.match(seen, /99/)
  }))

test('files, watches and signed URLs', () =>
  withSandbox(async (sandbox) => {
    await sandbox.files.write('d/f.txt', 'content')
    assert.equal(await sandbox.files.read('d/f.txt'), 'content')
    assert.deepEqual((await sandbox.files.list('d')).map((entry) => entry.name), ['f.txt'])
    let changed
    const told = new Promise((resolve) => (changed = resolve))
    const watch = await sandbox.files.watchDir('d', (event) => event.type === FilesystemEventType.WRITE && changed(event.name))
    await sandbox.files.write('d/g.txt', 'more')
    assert.equal(await told, 'g.txt')
    await watch.stop()
    const url = await sandbox.downloadUrl('d/f.txt', { useSignatureExpiration: 60_000 })
    assert.equal(await (await fetch(url)).text(), 'content')
    await sandbox.files.remove('d')
    assert.ok(!(await sandbox.files.exists('d')))
    await assert.rejects(sandbox.files.read('d/f.txt'), NotFoundError)
  }))

test('pause and connect', () =>
  withSandbox(async (sandbox) => {
    await sandbox.files.write('kept', 'yes')
    await sandbox.pause()
    assert.equal((await sandbox.getInfo()).state, 'paused')
    const same = await Sandbox.connect(sandbox.sandboxId)
    assert.equal(await same.files.read('kept'), 'yes')
  }))

test('a snapshot', () =>
  withSandbox(async (sandbox) => {
    await sandbox.files.write('kept', 'yes')
    const { snapshotId } = await sandbox.createSnapshot()
    const copy = await Sandbox.create(snapshotId, { timeoutMs: 60_000 })
    assert.equal(await copy.files.read('kept'), 'yes')
    await copy.kill()
    assert.ok(await Sandbox.deleteSnapshot(snapshotId))
  }))

test('metrics', () =>
  withSandbox(async (sandbox) => {
    const [metric] = await sandbox.getMetrics()
    assert.ok(metric.memUsed > 0 && metric.memTotal > metric.memUsed)
  }))
