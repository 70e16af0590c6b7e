// The official JavaScript SDK on Kelvin: npm install e2b; E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY are set.
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create('base', { timeoutMs: 60_000 })
try {
  await sandbox.files.write('hello.py', 'print(6 * 7)')
  process.stdout.write((await sandbox.commands.run('python3 hello.py')).stdout)
} finally {
  await sandbox.kill()
}
