-- The whole schema as it stands, for reading: `make schema` joins it out of the migrations, and a test compares what the two make.


-- ============================================================================
-- accounts
-- ============================================================================

-- Accounts: the gateway's state, users, keys, plans and limits. Money is bigint nano-US-dollars (*_nanos); 1 credit = 1 US dollar.
-- Every table: row level security on, no policy, nothing for public, anon and authenticated; the service role works through grants.

create schema if not exists extensions;

create table public.gateway_state (
    singleton boolean primary key default true check (singleton),
    mode text not null default 'sandbox' check (mode in ('sandbox', 'live')),
    mode_since timestamptz not null default now(),
    -- No record that expires before this moment is still pending: the sweep starts here.
    swept_until timestamptz not null default '-infinity'
);
comment on table public.gateway_state is 'One row: what this database remembers about itself.';
insert into public.gateway_state default values;
alter table public.gateway_state enable row level security;
revoke all on public.gateway_state from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.gateway_state to service_role;

create table public.users (
    id bigint generated always as identity primary key,
    username varchar(64) not null,
    email varchar(254) not null,
    auth_method text not null default 'email',
    role text not null default 'user',
    credits_nanos bigint not null default 0,
    held_nanos bigint not null default 0,
    is_funded boolean not null default false,
    is_active boolean not null default true,
    subscription_status text not null default 'trial',
    trial_expires_at timestamptz,
    preferences jsonb not null default '{}',
    settings jsonb not null default '{}',
    registration_date timestamptz not null default now(),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint users_never_overdrawn check (0 <= held_nanos and held_nanos <= credits_nanos)
) with (fillfactor = 50);
-- One function, because PostgreSQL reads the text of a table's checks anew for every statement, and users are updated twice a request.
create function public.is_sound_user(u public.users) returns boolean language plpgsql immutable as $$
begin
    return u.username <> '' and length(u.email) >= 3
        and u.auth_method in ('email', 'wallet', 'google', 'github')
        and u.role in ('user', 'admin')
        and u.subscription_status in ('trial', 'active', 'expired', 'cancelled')
        and jsonb_typeof(u.preferences) = 'object' and jsonb_typeof(u.settings) = 'object';
end $$;
revoke all on function public.is_sound_user(public.users) from public, anon, authenticated;
grant execute on function public.is_sound_user(public.users) to service_role;
alter table public.users add constraint users_sound check (public.is_sound_user(users));
comment on column public.users.is_funded is
    'True once an admin granted or the user bought credits: pay-as-you-go instead of the free plan''s limits.';
comment on constraint users_never_overdrawn on public.users is
    'Promise 1: credits never fall below what is held, and what is held never below zero.';
create unique index users_email_key on public.users (lower(email));
comment on index public.users_email_key is 'One account per address, whatever its case.';
create unique index users_username_key on public.users (lower(username));
alter table public.users enable row level security;
revoke all on public.users from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.users to service_role;
revoke all on sequence public.users_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.users_id_seq to service_role;

create table public.api_keys_new (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    key_hash text not null check (key_hash ~ '^[0-9a-f]{64}$'),
    hash_secret_id text not null,
    encrypted_key text,
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    ip_allowlist cidr[] not null default '{}',
    domain_referrers text[] not null default '{}',
    allowed_models text[],
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    budget_nanos bigint check (budget_nanos >= 0),
    budget_window text check (budget_window in ('day', 'week', 'month', 'lifetime')),
    is_primary boolean not null default false,
    is_active boolean not null default true,
    previous_key_hash text check (previous_key_hash ~ '^[0-9a-f]{64}$'),
    previous_hash_secret_id text,
    previous_valid_until timestamptz,
    revoked_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint api_keys_new_budget_has_window check ((budget_nanos is null) = (budget_window is null))
) with (fillfactor = 80);
comment on table public.api_keys_new is 'The keys. Only an HMAC is stored; requests_used and last_used_at live in rate_limit_usage.';
create unique index api_keys_new_hash_key on public.api_keys_new (key_hash);
create unique index api_keys_new_previous_hash_key on public.api_keys_new (previous_key_hash) where previous_key_hash is not null;
create unique index api_keys_new_name_key on public.api_keys_new (user_id, key_name) where revoked_at is null;
comment on index public.api_keys_new_name_key is 'A name is unique among a user''s keys that are not revoked.';
create unique index api_keys_new_primary_key on public.api_keys_new (user_id) where is_primary and revoked_at is null;
create index api_keys_new_user_idx on public.api_keys_new (user_id);
create index api_keys_new_prefix_idx on public.api_keys_new (last4);
alter table public.api_keys_new enable row level security;
revoke all on public.api_keys_new from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys_new to service_role;
revoke all on sequence public.api_keys_new_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_new_id_seq to service_role;

create table public.api_keys (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_sha256 text not null unique check (key_sha256 ~ '^[0-9a-f]{64}$'),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    is_active boolean not null default true,
    moved_to bigint references public.api_keys_new (id),
    created_at timestamptz not null default now()
);
comment on table public.api_keys is 'Keys of older formats, brought in by import, known by their SHA-256 until they are moved to api_keys_new on first use.';
create index api_keys_user_idx on public.api_keys (user_id);
alter table public.api_keys enable row level security;
revoke all on public.api_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys to service_role;
revoke all on sequence public.api_keys_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_id_seq to service_role;

create table public.plans (
    id bigint generated always as identity primary key,
    slug text not null unique check (slug ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    name text not null check (length(name) between 1 and 100),
    description text not null default '',
    price_per_month_nanos bigint not null default 0 check (price_per_month_nanos >= 0),
    daily_request_limit bigint check (daily_request_limit >= 0),
    monthly_request_limit bigint check (monthly_request_limit >= 0),
    daily_token_limit bigint check (daily_token_limit >= 0),
    monthly_token_limit bigint check (monthly_token_limit >= 0),
    concurrency integer check (concurrency >= 0),
    features text[] not null default '{}',
    allowed_models text[],
    environment_factors jsonb not null default '{"staging": 1, "development": 1}'
        check (jsonb_typeof(environment_factors) = 'object'),
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
comment on table public.plans is 'What a subscription allows; null is unlimited, zero refuses all. "free" and "pay-as-you-go" apply without a subscription.';
insert into public.plans (slug, name, description, daily_request_limit, monthly_request_limit, daily_token_limit, monthly_token_limit)
values ('free', 'Free', 'What an account without a plan and without bought or granted credits may use.', 100, 1000, 10000, 100000),
       ('pay-as-you-go', 'Pay as you go', 'Prepaid credits without a plan: rate limits only.', null, null, null, null);
alter table public.plans enable row level security;
revoke all on public.plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.plans to service_role;
revoke all on sequence public.plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.plans_id_seq to service_role;

create table public.user_plans (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    plan_id bigint not null references public.plans (id),
    start_date timestamptz not null,
    end_date timestamptz not null,
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    constraint user_plans_in_order check (start_date < end_date)
);
create unique index user_plans_one_active on public.user_plans (user_id) where is_active;
comment on index public.user_plans_one_active is 'A user has one plan at a time; the others are history.';
create index user_plans_plan_idx on public.user_plans (plan_id);
create index user_plans_user_idx on public.user_plans (user_id);
alter table public.user_plans enable row level security;
revoke all on public.user_plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.user_plans to service_role;
revoke all on sequence public.user_plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.user_plans_id_seq to service_role;

create table public.rate_limit_configs (
    subject text not null check (subject in ('default', 'user', 'key')),
    subject_id bigint not null,
    requests_per_minute bigint check (requests_per_minute >= 0),
    requests_per_hour bigint check (requests_per_hour >= 0),
    requests_per_day bigint check (requests_per_day >= 0),
    tokens_per_minute bigint check (tokens_per_minute >= 0),
    tokens_per_hour bigint check (tokens_per_hour >= 0),
    tokens_per_day bigint check (tokens_per_day >= 0),
    concurrency integer check (concurrency >= 0),
    burst bigint check (burst >= 0),
    updated_at timestamptz not null default now(),
    primary key (subject, subject_id)
);
comment on table public.rate_limit_configs is
    'Limits of a user or a key; null is unlimited, zero refuses all. A user without a row has the default''s; a key without one has only its user''s.';
insert into public.rate_limit_configs (subject, subject_id, requests_per_minute, requests_per_hour, requests_per_day,
                                       tokens_per_minute, tokens_per_hour, tokens_per_day)
values ('default', 0, 60, 1000, 10000, 10000, 100000, 1000000);
alter table public.rate_limit_configs enable row level security;
revoke all on public.rate_limit_configs from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_configs to service_role;


-- ============================================================================
-- ledger
-- ============================================================================

-- The books: usage records (the journal), credit transactions and the audit log. What was written stays written.

create table public.usage_records (
    request_id uuid primary key,
    client_request_id varchar(256),
    user_id bigint not null references public.users (id),
    key_id bigint not null references public.api_keys_new (id),
    mode text not null,
    environment text not null,
    endpoint text not null,
    model text not null,
    model_used text,
    provider text,
    prompt_estimate bigint not null default 0,
    output_granted bigint not null default 0,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    hold_nanos bigint not null,
    upstream_cost_nanos bigint,
    cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    markup numeric not null,
    status text not null default 'pending',
    settlement_source text,
    finish_reason text,
    error_code text,
    streamed boolean not null default false,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id varchar(256),
    created_at timestamptz not null,
    expires_at timestamptz not null,
    settled_at timestamptz
) with (fillfactor = 40);

-- What holds of every record. One function, because PostgreSQL reads the text of a table's checks anew for every statement: as a dozen
-- checks these rules took a quarter of the time of admission and settlement.
create function public.is_sound_record(r public.usage_records) returns boolean language plpgsql immutable as $$
begin
    return least(r.prompt_estimate, r.output_granted, r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos, r.overrun_nanos) >= 0
        and r.markup > 0
        and r.mode in ('sandbox', 'live')
        and r.environment in ('live', 'test', 'staging', 'development')
        and case r.status
            when 'pending' then r.settled_at is null and r.settlement_source is null and r.cost_nanos = 0
            else r.status in ('completed', 'failed', 'cancelled', 'expired') and r.settled_at is not null
                 and coalesce(r.settlement_source in ('usage', 'generation', 'none'), false)
        end;
end $$;
revoke all on function public.is_sound_record(public.usage_records) from public, anon, authenticated;
grant execute on function public.is_sound_record(public.usage_records) to service_role;
alter table public.usage_records add constraint usage_records_sound check (public.is_sound_record(usage_records));
comment on constraint usage_records_sound on public.usage_records is
    'No negative amount; pending without an end and a cost, settled with both.';
comment on table public.usage_records is
    'One row per admitted request: pending with its hold, then finished by settlement. No index may mention what settlement changes, '
    'or updates stop being heap-only; a settled row is longer, and 40 leaves room for a page whose rows are settled in one transaction.';
create index usage_records_user_idx on public.usage_records (user_id, created_at desc);
create index usage_records_key_idx on public.usage_records (key_id, created_at);
create index usage_records_expiry_idx on public.usage_records using brin (expires_at) with (pages_per_range = 16);
comment on index public.usage_records_expiry_idx is 'The sweep''s way to expired holds; records arrive in this order.';
alter table public.usage_records enable row level security;
revoke all on public.usage_records from public, anon, authenticated, service_role;
grant select, insert, update on public.usage_records to service_role;

create table public.credit_transactions (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    kind text not null check (kind in ('grant', 'purchase', 'refund', 'adjustment', 'expiry')),
    amount_nanos bigint not null check (amount_nanos <> 0),
    balance_after_nanos bigint not null check (balance_after_nanos >= 0),
    payment_method text check (payment_method in ('mastercard', 'paca_token')),
    request_id uuid references public.usage_records (request_id),
    idempotency_key text check (length(idempotency_key) between 1 and 255),
    actor text not null,
    reason text not null default '' check (length(reason) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint credit_transactions_sign check (
        case kind when 'grant' then amount_nanos > 0 when 'purchase' then amount_nanos > 0 when 'refund' then amount_nanos > 0
                  when 'expiry' then amount_nanos < 0 else true end
    ),
    constraint credit_transactions_refund_names_request check ((kind = 'refund') = (request_id is not null))
);
comment on table public.credit_transactions is 'Every change of credits that is not the charge of a request.';
create unique index credit_transactions_idempotency_key on public.credit_transactions (idempotency_key);
comment on index public.credit_transactions_idempotency_key is 'The same order twice is one transaction.';
create index credit_transactions_user_idx on public.credit_transactions (user_id, id desc);
create index credit_transactions_request_idx on public.credit_transactions (request_id) where request_id is not null;
alter table public.credit_transactions enable row level security;
revoke all on public.credit_transactions from public, anon, authenticated, service_role;
grant select, insert on public.credit_transactions to service_role;
revoke all on sequence public.credit_transactions_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.credit_transactions_id_seq to service_role;

create table public.audit_logs (
    id bigint generated always as identity primary key,
    actor text not null,
    action text not null,
    target text,
    user_id bigint references public.users (id),
    key_id bigint references public.api_keys_new (id),
    ip inet,
    user_agent text check (length(user_agent) <= 512),
    request_id uuid,
    details jsonb not null default '{}' check (jsonb_typeof(details) = 'object'),
    -- Set for refusals only: the same refusal of the same subject within a minute is one row with a count.
    refusal_minute timestamptz,
    occurrences bigint not null default 1 check (occurrences > 0),
    created_at timestamptz not null default clock_timestamp()
);
create unique index audit_logs_refusal_key on public.audit_logs (actor, action, refusal_minute) where refusal_minute is not null;
create index audit_logs_user_idx on public.audit_logs (user_id, id desc);
create index audit_logs_key_idx on public.audit_logs (key_id, id desc);
alter table public.audit_logs enable row level security;
revoke all on public.audit_logs from public, anon, authenticated, service_role;
grant select, insert, update on public.audit_logs to service_role;
revoke all on sequence public.audit_logs_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.audit_logs_id_seq to service_role;

create function public.refuse_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% is append-only: % is refused', tg_table_name, lower(tg_op) using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_change() from public, anon, authenticated;
grant execute on function public.refuse_change() to service_role;

create trigger credit_transactions_append_only before update or delete on public.credit_transactions
    for each row execute function public.refuse_change();
create trigger credit_transactions_no_truncate before truncate on public.credit_transactions
    for each statement execute function public.refuse_change();
create trigger usage_records_never_deleted before delete on public.usage_records
    for each row execute function public.refuse_change();
create trigger usage_records_no_truncate before truncate on public.usage_records
    for each statement execute function public.refuse_change();
create trigger audit_logs_never_deleted before delete on public.audit_logs
    for each row execute function public.refuse_change();
create trigger audit_logs_no_truncate before truncate on public.audit_logs
    for each statement execute function public.refuse_change();

-- A settled record is frozen; only one that was settled without knowing the cost may be amended, once, by what the upstream says.
create function public.refuse_thaw() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.settlement_source = 'none' and new.settlement_source in ('usage', 'generation')
       and (new.request_id, new.user_id, new.key_id, new.hold_nanos, new.markup, new.created_at)
           is not distinct from (old.request_id, old.user_id, old.key_id, old.hold_nanos, old.markup, old.created_at) then
        return new;
    end if;
    raise exception 'usage record % is settled and frozen', old.request_id using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_thaw() from public, anon, authenticated;
grant execute on function public.refuse_thaw() to service_role;
create trigger usage_records_frozen before update on public.usage_records
    for each row when (old.status <> 'pending') execute function public.refuse_thaw();

create function public.refuse_identity_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception 'usage record %: who, when and how much was held never changes', old.request_id using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_identity_change() from public, anon, authenticated;
grant execute on function public.refuse_identity_change() to service_role;
create trigger usage_records_identity before update of request_id, user_id, key_id, mode, environment, hold_nanos, markup, created_at
    on public.usage_records for each row execute function public.refuse_identity_change();

-- Of an audit row only the count of a repeated refusal may grow.
create function public.refuse_audit_change() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.refusal_minute is not null and new.occurrences > old.occurrences
       and to_jsonb(new) - 'occurrences' = to_jsonb(old) - 'occurrences' then
        return new;
    end if;
    raise exception 'audit_logs is append-only: update is refused' using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_audit_change() from public, anon, authenticated;
grant execute on function public.refuse_audit_change() to service_role;
create trigger audit_logs_append_only before update on public.audit_logs
    for each row execute function public.refuse_audit_change();


-- ============================================================================
-- limits
-- ============================================================================

-- Limits: counters in rings of buckets, one row per subject, and the arithmetic on them.
--
-- A ring of n buckets is a bigint[]: [1..n] requests, [n+1..2n] tokens, [2n+1] all requests, [2n+2] all tokens, [2n+3] the number of the
-- newest bucket (unix time / bucket width). The n buckets are those that touch the last window, so their sum never misses anything
-- that happened within it: no interval of the window's length ever exceeds the limit, and a place frees at most a bucket late.

create function public.empty_ring(p_size int) returns bigint[] language sql immutable set search_path = '' as $$
    select array_fill(0::bigint, array[2 * p_size + 3])
$$;
revoke all on function public.empty_ring(int) from public, anon, authenticated;
grant execute on function public.empty_ring(int) to service_role;

create table public.rate_limit_usage (
    subject text not null,
    subject_id bigint not null,
    -- Null for a key without limits of its own: there is nothing to count for.
    burst_ring bigint[] default public.empty_ring(11),
    minute_ring bigint[] default public.empty_ring(7),
    hour_ring bigint[] default public.empty_ring(13),
    day_ring bigint[] default public.empty_ring(25),
    plan_day date not null default '-infinity',
    plan_day_requests bigint not null default 0,
    plan_day_tokens bigint not null default 0,
    plan_month date not null default '-infinity',
    plan_month_requests bigint not null default 0,
    plan_month_tokens bigint not null default 0,
    slots bigint not null default 0,
    test_slots bigint not null default 0,
    budget_since timestamptz not null default '-infinity',
    budget_spent_nanos bigint not null default 0,
    budget_held_nanos bigint not null default 0,
    requests_used bigint not null default 0,
    last_used_at timestamptz,
    -- Nothing of this subject that is older was still pending: where a recount has to start.
    pending_since timestamptz not null default '-infinity',
    recounted_at timestamptz not null default '-infinity',
    primary key (subject, subject_id),
    -- One short expression: PostgreSQL reads a table's checks anew for every statement.
    constraint rate_limit_usage_never_negative check (
        least(slots, test_slots, budget_spent_nanos, budget_held_nanos, plan_day_tokens, plan_month_tokens) >= 0
    )
) with (fillfactor = 50);
comment on table public.rate_limit_usage is 'The counters of a key, a user or a network address. No row is shared between users.';
alter table public.rate_limit_usage enable row level security;
revoke all on public.rate_limit_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_usage to service_role;

create function public.advance_ring(p_ring bigint[], p_size int, p_now bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest;
    v_slot int;
begin
    if p_ring is null or v_newest >= p_now then
        return v_ring;
    end if;
    if p_now - v_newest >= p_size then
        v_ring := array_fill(0::bigint, array[2 * p_size + 3]);
    else
        while v_bucket < p_now loop -- a for loop counts in integers, which these numbers exceed
            v_bucket := v_bucket + 1;
            v_slot := v_bucket % p_size + 1;
            v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] - v_ring[v_slot];
            v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] - v_ring[p_size + v_slot];
            v_ring[v_slot] := 0;
            v_ring[p_size + v_slot] := 0;
        end loop;
    end if;
    v_ring[2 * p_size + 3] := p_now;
    return v_ring;
end $$;
comment on function public.advance_ring is 'The ring with p_now as its newest bucket; a clock that went backwards leaves it as it is.';
revoke all on function public.advance_ring(bigint[], int, bigint) from public, anon, authenticated;
grant execute on function public.advance_ring(bigint[], int, bigint) to service_role;

create function public.count_in_ring(p_ring bigint[], p_size int, p_bucket bigint, p_requests bigint, p_tokens bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_slot int := least(p_bucket, v_newest) % p_size + 1;
begin
    if p_ring is null or p_bucket <= v_newest - p_size then
        return v_ring;
    end if;
    v_ring[v_slot] := v_ring[v_slot] + p_requests;
    v_ring[p_size + v_slot] := v_ring[p_size + v_slot] + p_tokens;
    v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] + p_requests;
    v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] + p_tokens;
    return v_ring;
end $$;
comment on function public.count_in_ring is
    'Counts in one bucket of an advanced ring, null for the newest; a bucket that has left the ring counts no more.';
revoke all on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.ring_frees_at(p_ring bigint[], p_size int, p_width_ms bigint, p_offset int, p_excess bigint) returns bigint
language plpgsql immutable as $$
declare
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest - p_size;
    v_freed bigint := 0;
begin
    while v_bucket < v_newest loop
        v_bucket := v_bucket + 1;
        v_freed := v_freed + p_ring[p_offset + v_bucket % p_size + 1];
        if v_freed >= p_excess then
            return (v_bucket + p_size) * p_width_ms;
        end if;
    end loop;
    return (v_newest + p_size) * p_width_ms;
end $$;
comment on function public.ring_frees_at is
    'When (unix ms) at least p_excess of what was counted will have left the ring; p_offset 0 looks at requests, p_size at tokens.';
revoke all on function public.ring_frees_at(bigint[], int, bigint, int, bigint) from public, anon, authenticated;
grant execute on function public.ring_frees_at(bigint[], int, bigint, int, bigint) to service_role;

-- What the limits say so far: the longest refusal (window is null while there is none), and the tightest limits for the headers.
create type public.limit_state as (
    refused_window text,
    refused_unit text,
    refused_limit bigint,
    frees_at_ms bigint,
    never boolean,
    request_limit bigint,
    request_left bigint,
    request_reset_ms bigint,
    token_limit bigint,
    token_left bigint,
    token_reset_ms bigint
);
revoke all on type public.limit_state from public, anon, authenticated;
grant usage on type public.limit_state to service_role;

-- Of several refusals the one that lasts longest is told: after its Retry-After none of them stands in the way.
create function public.refuse_until(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_never boolean, p_frees_at_ms bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if v_state.refused_window is null or (p_never, p_frees_at_ms) > (v_state.never, v_state.frees_at_ms) then
        v_state.refused_window := p_window;
        v_state.refused_unit := p_unit;
        v_state.refused_limit := p_limit;
        v_state.never := p_never;
        v_state.frees_at_ms := p_frees_at_ms;
    end if;
    return v_state;
end $$;
revoke all on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint) from public, anon, authenticated;
grant execute on function public.refuse_until(public.limit_state, text, text, bigint, boolean, bigint) to service_role;

create function public.check_window(
    p_state public.limit_state, p_window text, p_ring bigint[], p_size int, p_width_ms bigint,
    p_requests bigint, p_tokens bigint, p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
    v_requests bigint := p_ring[2 * p_size + 1];
    v_tokens bigint := p_ring[2 * p_size + 2];
    v_empty_at bigint := (p_ring[2 * p_size + 3] + p_size) * p_width_ms;
begin
    if v_requests + 1 > p_requests then
        v_state := public.refuse_until(v_state, p_window, 'requests', p_requests, p_requests = 0,
                                       public.ring_frees_at(p_ring, p_size, p_width_ms, 0, v_requests + 1 - p_requests));
    end if;
    if v_tokens + p_need > p_tokens then
        v_state := public.refuse_until(v_state, p_window, 'tokens', p_tokens, p_need > p_tokens,
                                       public.ring_frees_at(p_ring, p_size, p_width_ms, p_size, v_tokens + p_need - p_tokens));
    end if;
    if p_requests - v_requests < v_state.request_left or (v_state.request_left is null and p_requests is not null) then
        v_state.request_limit := p_requests;
        v_state.request_left := p_requests - v_requests;
        v_state.request_reset_ms := v_empty_at;
    end if;
    if p_tokens - v_tokens < v_state.token_left or (v_state.token_left is null and p_tokens is not null) then
        v_state.token_limit := p_tokens;
        v_state.token_left := p_tokens - v_tokens;
        v_state.token_reset_ms := v_empty_at;
    end if;
    return v_state;
end $$;
revoke all on function public.check_window(public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.check_window(public.limit_state, text, bigint[], int, bigint, bigint, bigint, bigint) to service_role;

create function public.check_limits(
    p_state public.limit_state, p_limits public.rate_limit_configs, p_usage public.rate_limit_usage, p_need bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limits.burst is not null then
        v_state := public.check_window(v_state, 'second', p_usage.burst_ring, 11, 100, p_limits.burst, null, p_need);
    end if;
    if p_limits.requests_per_minute is not null or p_limits.tokens_per_minute is not null then
        v_state := public.check_window(v_state, 'minute', p_usage.minute_ring, 7, 10000,
                                       p_limits.requests_per_minute, p_limits.tokens_per_minute, p_need);
    end if;
    if p_limits.requests_per_hour is not null or p_limits.tokens_per_hour is not null then
        v_state := public.check_window(v_state, 'hour', p_usage.hour_ring, 13, 300000,
                                       p_limits.requests_per_hour, p_limits.tokens_per_hour, p_need);
    end if;
    if p_limits.requests_per_day is not null or p_limits.tokens_per_day is not null then
        v_state := public.check_window(v_state, 'day', p_usage.day_ring, 25, 3600000,
                                       p_limits.requests_per_day, p_limits.tokens_per_day, p_need);
    end if;
    return v_state;
end $$;
revoke all on function public.check_limits(public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint)
    from public, anon, authenticated;
grant execute on function public.check_limits(public.limit_state, public.rate_limit_configs, public.rate_limit_usage, bigint)
    to service_role;

-- One counter of a plan (a UTC day or month): refuses, and takes part in the search for the tightest limit.
create function public.check_plan_counter(
    p_state public.limit_state, p_window text, p_unit text, p_limit bigint, p_used bigint, p_need bigint, p_resets_ms bigint
) returns public.limit_state language plpgsql immutable as $$
declare
    v_state public.limit_state := p_state;
begin
    if p_limit is null then
        return v_state;
    end if;
    if p_used + p_need > p_limit then
        v_state := public.refuse_until(v_state, p_window, p_unit, p_limit, p_need > p_limit, p_resets_ms);
    end if;
    if p_unit = 'requests' and (v_state.request_left is null or p_limit - p_used < v_state.request_left) then
        v_state.request_limit := p_limit;
        v_state.request_left := p_limit - p_used;
        v_state.request_reset_ms := p_resets_ms;
    elsif p_unit = 'tokens' and (v_state.token_left is null or p_limit - p_used < v_state.token_left) then
        v_state.token_limit := p_limit;
        v_state.token_left := p_limit - p_used;
        v_state.token_reset_ms := p_resets_ms;
    end if;
    return v_state;
end $$;
revoke all on function public.check_plan_counter(public.limit_state, text, text, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.check_plan_counter(public.limit_state, text, text, bigint, bigint, bigint, bigint) to service_role;

create function public.check_plan(
    p_state public.limit_state, p_plan public.plans, p_usage public.rate_limit_usage, p_factor numeric, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state := p_state;
    v_day_ends bigint := extract(epoch from (date_trunc('day', p_now, 'UTC') + interval '1 day')) * 1000;
    v_month_ends bigint := extract(epoch from ((date_trunc('month', p_now at time zone 'UTC') + interval '1 month') at time zone 'UTC')) * 1000;
begin
    v_state := public.check_plan_counter(v_state, 'plan day', 'requests', floor(p_plan.daily_request_limit * p_factor)::bigint,
                                         p_usage.plan_day_requests, 1, v_day_ends);
    v_state := public.check_plan_counter(v_state, 'plan day', 'tokens', floor(p_plan.daily_token_limit * p_factor)::bigint,
                                         p_usage.plan_day_tokens, p_need, v_day_ends);
    v_state := public.check_plan_counter(v_state, 'plan month', 'requests', floor(p_plan.monthly_request_limit * p_factor)::bigint,
                                         p_usage.plan_month_requests, 1, v_month_ends);
    v_state := public.check_plan_counter(v_state, 'plan month', 'tokens', floor(p_plan.monthly_token_limit * p_factor)::bigint,
                                         p_usage.plan_month_tokens, p_need, v_month_ends);
    return v_state;
end $$;
revoke all on function public.check_plan(public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.check_plan(public.limit_state, public.plans, public.rate_limit_usage, numeric, bigint, timestamptz)
    to service_role;

-- The counters of a subject as of p_now: rings advanced, plan counters of another day or month and a budget of another window emptied.
create function public.advance_usage(p_usage public.rate_limit_usage, p_now timestamptz, p_budget_window text)
returns public.rate_limit_usage language plpgsql stable as $$
declare
    v_usage public.rate_limit_usage := p_usage;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_now at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_now at time zone 'UTC')::date;
    v_since timestamptz := public.budget_start(p_budget_window, p_now);
begin
    v_usage.burst_ring := public.advance_ring(v_usage.burst_ring, 11, v_ms / 100);
    v_usage.minute_ring := public.advance_ring(v_usage.minute_ring, 7, v_ms / 10000);
    v_usage.hour_ring := public.advance_ring(v_usage.hour_ring, 13, v_ms / 300000);
    v_usage.day_ring := public.advance_ring(v_usage.day_ring, 25, v_ms / 3600000);
    if v_usage.plan_day < v_day then
        v_usage.plan_day := v_day;
        v_usage.plan_day_requests := 0;
        v_usage.plan_day_tokens := 0;
    end if;
    if v_usage.plan_month < v_month then
        v_usage.plan_month := v_month;
        v_usage.plan_month_requests := 0;
        v_usage.plan_month_tokens := 0;
    end if;
    if p_budget_window is not null and v_usage.budget_since < v_since then
        v_usage.budget_since := v_since;
        v_usage.budget_spent_nanos := 0;
    end if;
    return v_usage;
end $$;

create function public.budget_start(p_window text, p_now timestamptz) returns timestamptz
language sql stable as $$
    select case p_window
        when 'day' then date_trunc('day', p_now, 'UTC')
        when 'week' then date_trunc('week', p_now, 'UTC')
        when 'month' then date_trunc('month', p_now, 'UTC')
        else '-infinity'::timestamptz
    end
$$;
revoke all on function public.budget_start(text, timestamptz) from public, anon, authenticated;
grant execute on function public.budget_start(text, timestamptz) to service_role;
revoke all on function public.advance_usage(public.rate_limit_usage, timestamptz, text) from public, anon, authenticated;
grant execute on function public.advance_usage(public.rate_limit_usage, timestamptz, text) to service_role;


-- ============================================================================
-- admission
-- ============================================================================

-- Admission: one call decides for many requests, and a request is admitted only if this could hold an upper bound of its cost.
-- Expected refusals are returned rows. Time is clock_timestamp() after the locks. Every writer locks its users first, in id order.

create function public.scope_allows(p_scopes jsonb, p_verb text, p_resource text) returns boolean
language sql immutable as $$
    select coalesce((p_scopes -> p_verb) ?| array['*', p_resource], false)
$$;
revoke all on function public.scope_allows(jsonb, text, text) from public, anon, authenticated;
grant execute on function public.scope_allows(jsonb, text, text) to service_role;

create function public.domain_allowed(p_allowed text[], p_domain text) returns boolean
language sql immutable as $$
    select coalesce(bool_or(p_domain = d or (d like '*.%' and length(p_domain) > length(d) - 1 and right(p_domain, length(d) - 1) = substr(d, 2))), false)
    from unnest(p_allowed) as d
$$;
comment on function public.domain_allowed is 'Exact, or *.example.com for anything below example.com.';
revoke all on function public.domain_allowed(text[], text) from public, anon, authenticated;
grant execute on function public.domain_allowed(text[], text) to service_role;

create function public.models_allowed(p_allowed text[], p_models text[]) returns boolean
language sql immutable as $$
    select p_allowed is null or coalesce(bool_and(exists (
        select from unnest(p_allowed) as a where a = m or (right(a, 1) = '*' and starts_with(m, left(a, -1)))
    )), true) from unnest(p_models) as m
$$;
comment on function public.models_allowed is 'Every model must be allowed: exact, or a prefix that ends with *; null allows all.';
revoke all on function public.models_allowed(text[], text[]) from public, anon, authenticated;
grant execute on function public.models_allowed(text[], text[]) to service_role;

-- The id of the key with one of these hashes: current, or previous within its grace. A key of an older format that was moved is found
-- by its hash like any other, so that rotating it ends the old secret.
create function public.find_key(p_hashes text[]) returns bigint
language plpgsql stable as $$
declare
    v_id bigint;
begin
    select id into v_id from public.api_keys_new where key_hash = any (p_hashes) limit 1;
    if v_id is null then
        select id into v_id from public.api_keys_new
        where previous_key_hash = any (p_hashes) and previous_valid_until > clock_timestamp() limit 1;
    end if;
    return v_id;
end $$;
revoke all on function public.find_key(text[]) from public, anon, authenticated;
grant execute on function public.find_key(text[]) to service_role;

-- The owner must be locked: then the first of two concurrent first uses moves the key, and the second finds it moved.
create function public.move_legacy_key(p_legacy_hash text, p_hash text, p_secret_id text) returns public.api_keys_new
language plpgsql as $$
declare
    v_old public.api_keys;
    v_key public.api_keys_new;
begin
    select * into v_old from public.api_keys where key_sha256 = p_legacy_hash and moved_to is null for update;
    if not found then
        return null;
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag,
                                     scope_permissions, expiration_date, max_requests, is_active)
    values (v_old.user_id, left(v_old.key_name, 80) || ' (imported ' || v_old.id || ')', v_old.key_prefix, v_old.last4, p_hash, p_secret_id,
            v_old.environment_tag, v_old.scope_permissions, v_old.expiration_date, v_old.max_requests, v_old.is_active)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    update public.api_keys set moved_to = v_key.id where id = v_old.id;
    return v_key;
end $$;
revoke all on function public.move_legacy_key(text, text, text) from public, anon, authenticated;
grant execute on function public.move_legacy_key(text, text, text) to service_role;

-- Locks these users in id order and returns the ids that it locked: all of them, or, where another transaction holds one for longer
-- than lock_timeout, those that are free by then.
create function public.lock_users(p_ids bigint[]) returns bigint[]
language plpgsql set search_path = '' set lock_timeout = '250ms' as $$
declare
    v_locked bigint[];
begin
    begin
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update) as l;
    exception when lock_not_available then
        select array_agg(l.id) into v_locked
        from (select u.id from public.users u where u.id = any (p_ids) order by u.id for no key update skip locked) as l;
    end;
    return coalesce(v_locked, '{}');
end $$;
comment on function public.lock_users is 'A user that stays locked elsewhere must not keep its neighbours in a batch from being served.';
revoke all on function public.lock_users(bigint[]) from public, anon, authenticated;
grant execute on function public.lock_users(bigint[]) to service_role;

-- Writes what refusal_note made: all of a batch at once and in one order, as two batches that met in opposite orders would deadlock.
create function public.note_refusals(p_notes jsonb[]) returns void language sql set search_path = '' as $$
    insert into public.audit_logs as a (actor, action, target, user_id, key_id, ip, user_agent, request_id, refusal_minute, occurrences)
    select n.actor, n.action, 'api', (array_agg(n.user_id))[1], (array_agg(n.key_id))[1], (array_agg(n.ip))[1],
           (array_agg(n.user_agent))[1], (array_agg(n.request_id))[1], date_trunc('minute', clock_timestamp()), count(*)
    from unnest(p_notes) as j, jsonb_to_record(j) as n (actor text, action text, user_id bigint, key_id bigint, ip inet,
                                                        user_agent text, request_id uuid)
    group by n.actor, n.action
    order by n.actor collate "C", n.action collate "C"
    on conflict (actor, action, refusal_minute) where refusal_minute is not null
    do update set occurrences = a.occurrences + excluded.occurrences
$$;
revoke all on function public.note_refusals(jsonb[]) from public, anon, authenticated;
grant execute on function public.note_refusals(jsonb[]) to service_role;

create type public.admission_item as (
    request_id uuid,
    client_request_id text,
    hashes text[],
    secret_id text,
    legacy_hash text,
    prefix_environment text,
    verb text,
    resource text,
    address text,
    domain text,
    user_agent text,
    mode text,
    holds boolean,
    resent boolean,
    endpoint text,
    streamed boolean,
    models text[],
    prompt_estimate bigint,
    fixed_nanos numeric,
    output_nanos numeric,
    min_output bigint,
    max_output bigint,
    markup numeric,
    ttl_seconds int
);
revoke all on type public.admission_item from public, anon, authenticated;
grant usage on type public.admission_item to service_role;

-- A refusal's answer, with what the audit log is to hold of it (`note`, which is taken out before the answer leaves).
create function public.refusal(p_code text, p_item public.admission_item, p_user_id bigint, p_key_id bigint) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', p_code, 'note', jsonb_build_object(
        'actor', coalesce('key:' || p_key_id, 'address:' || p_item.address, 'unknown'), 'action', p_code, 'user_id', p_user_id,
        'key_id', p_key_id, 'ip', p_item.address::inet, 'user_agent', left(p_item.user_agent, 512), 'request_id', p_item.request_id))
$$;
revoke all on function public.refusal(text, public.admission_item, bigint, bigint) from public, anon, authenticated;
grant execute on function public.refusal(text, public.admission_item, bigint, bigint) to service_role;

-- Why this key may not be used for this at all, as a code, or null. Limits and money come later.
create function public.refuse_identity(p_key public.api_keys_new, p_user public.users, p_item public.admission_item, p_now timestamptz)
returns text language plpgsql stable as $$
begin
    if p_key.id is null or (p_item.prefix_environment is not null and p_item.prefix_environment <> p_key.environment_tag) then
        return 'INVALID_KEY';
    elsif not p_key.is_active or p_key.revoked_at is not null then
        return 'INACTIVE_KEY';
    elsif p_key.expiration_date <= p_now then
        return 'EXPIRED_KEY';
    elsif p_user.deleted_at is not null then
        return 'INACTIVE_KEY';
    elsif cardinality(p_key.ip_allowlist) > 0 and not coalesce(p_item.address::inet <<= any (p_key.ip_allowlist), false) then
        return 'IP_NOT_ALLOWED';
    elsif cardinality(p_key.domain_referrers) > 0 and not public.domain_allowed(p_key.domain_referrers, p_item.domain) then
        return 'DOMAIN_NOT_ALLOWED';
    elsif not public.scope_allows(p_key.scope_permissions, p_item.verb, p_item.resource)
          or (p_item.verb = 'admin' and p_user.role <> 'admin') then
        return 'SCOPE_NOT_ALLOWED';
    elsif p_key.allowed_models is not null and not public.models_allowed(p_key.allowed_models, p_item.models) then
        return 'MODEL_NOT_ALLOWED';
    elsif not p_user.is_active then
        return 'ACCOUNT_SUSPENDED';
    end if;
    return null;
end $$;
revoke all on function public.refuse_identity(public.api_keys_new, public.users, public.admission_item, timestamptz)
    from public, anon, authenticated;
grant execute on function public.refuse_identity(public.api_keys_new, public.users, public.admission_item, timestamptz) to service_role;

create function public.current_plan(p_user public.users, p_now timestamptz) returns public.plans
language plpgsql stable as $$
declare
    v_plan public.plans;
begin
    select p.* into v_plan from public.user_plans up join public.plans p on p.id = up.plan_id
    where up.user_id = p_user.id and up.is_active and up.start_date <= p_now and p_now < up.end_date limit 1;
    if not found then
        select p.* into v_plan from public.plans p where p.slug = case when p_user.is_funded then 'pay-as-you-go' else 'free' end;
    end if;
    return v_plan;
end $$;
revoke all on function public.current_plan(public.users, timestamptz) from public, anon, authenticated;
grant execute on function public.current_plan(public.users, timestamptz) to service_role;

-- Up to four expired holds of a user, once in ten seconds, and slots and held budget counted anew from the journal.
create function public.recount_user(p_user_id bigint, p_key_id bigint, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_since timestamptz;
    v_expired jsonb;
begin
    select pending_since into v_since from public.rate_limit_usage
    where subject = 'user' and subject_id = p_user_id and recounted_at < p_now - interval '10 seconds';
    if not found then
        return null;
    end if;
    with pending as (
        select r.request_id, r.key_id, r.environment, r.generation_id, r.mode, r.hold_nanos, r.expires_at, r.created_at from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= v_since and r.status = 'pending'
    ), recounted as (
        update public.rate_limit_usage u set recounted_at = p_now,
            pending_since = coalesce((select min(created_at) from pending), p_now),
            slots = (select count(*) from pending),
            test_slots = (select count(*) from pending where environment = 'test')
        where u.subject = 'user' and u.subject_id = p_user_id
    ), recounted_key as (
        update public.rate_limit_usage u set
            slots = (select count(*) from pending where key_id = p_key_id),
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where key_id = p_key_id), 0)
        where u.subject = 'key' and u.subject_id = p_key_id
    )
    select jsonb_agg(jsonb_build_object('request_id', e.request_id, 'generation_id', e.generation_id, 'mode', e.mode,
                                        'environment', e.environment)) into v_expired
    from (select * from pending where expires_at <= p_now order by expires_at limit 4) as e;
    return v_expired;
end $$;
comment on function public.recount_user is 'So that a crash leaks neither money nor slots for longer than its hold''s time to live, with no worker running.';
revoke all on function public.recount_user(bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.recount_user(bigint, bigint, timestamptz) to service_role;

create function public.retry_after_seconds(p_frees_at_ms bigint, p_now timestamptz) returns bigint
language sql immutable as $$
    select greatest(1, ceil((p_frees_at_ms - extract(epoch from p_now) * 1000) / 1000.0))::bigint
$$;
revoke all on function public.retry_after_seconds(bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.retry_after_seconds(bigint, timestamptz) to service_role;

-- The limits' refusal of this request, or the state that allows it.
create function public.check_all_limits(
    p_key public.api_keys_new, p_user public.users, p_plan public.plans, p_key_limits public.rate_limit_configs,
    p_key_usage public.rate_limit_usage,
    p_user_usage public.rate_limit_usage, p_need bigint, p_now timestamptz
) returns public.limit_state language plpgsql stable as $$
declare
    v_state public.limit_state;
    v_limits public.rate_limit_configs;
    v_running bigint := p_user_usage.slots;
begin
    v_state := public.check_plan(v_state, p_plan, p_user_usage,
                                 coalesce((p_plan.environment_factors ->> p_key.environment_tag)::numeric, 1), p_need, p_now);
    if p_key_limits.subject is not null then
        v_state := public.check_limits(v_state, p_key_limits, p_key_usage, p_need);
        if v_state.refused_window is null and p_key_usage.slots >= p_key_limits.concurrency then
            v_state.refused_window := 'concurrency';
            v_state.refused_limit := p_key_limits.concurrency;
        end if;
    end if;
    select * into v_limits from public.rate_limit_configs where subject = 'user' and subject_id = p_user.id;
    if not found then
        select * into v_limits from public.rate_limit_configs where subject = 'default' and subject_id = 0;
    end if;
    v_state := public.check_limits(v_state, v_limits, p_user_usage, p_need);
    v_limits.concurrency := least(v_limits.concurrency, p_plan.concurrency);
    if p_key.environment_tag = 'test' and p_user_usage.test_slots >= 4 then
        v_running := greatest(v_running, 4);
        v_limits.concurrency := least(v_limits.concurrency, 4);
    end if;
    if v_state.refused_window is null and v_running >= v_limits.concurrency then
        v_state.refused_window := 'concurrency';
        v_state.refused_limit := v_limits.concurrency;
    end if;
    if v_state.refused_window = 'concurrency' then
        v_state.never := v_state.refused_limit = 0;
        v_state.frees_at_ms := floor(extract(epoch from p_now) * 1000) + 1000;
    end if;
    return v_state;
end $$;
revoke all on function public.check_all_limits(public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.check_all_limits(public.api_keys_new, public.users, public.plans, public.rate_limit_configs, public.rate_limit_usage,
    public.rate_limit_usage, bigint, timestamptz) to service_role;

-- How many output tokens this amount covers: p_max if it covers them all, else what it covers (below p_min is a refusal).
create function public.affordable_output(p_item public.admission_item, p_available_nanos bigint) returns bigint
language plpgsql immutable as $$
declare
    v_left numeric;
begin
    if ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.max_output) * p_item.markup) <= p_available_nanos then
        return p_item.max_output;
    end if;
    -- div() is exact where / would round, and a hold that is a nano-dollar too high would break users_never_overdrawn.
    v_left := p_available_nanos - p_item.fixed_nanos * p_item.markup;
    if p_item.output_nanos = 0 or v_left < 0 then
        return -1;
    end if;
    return least(p_item.max_output, div(v_left, p_item.output_nanos * p_item.markup))::bigint;
end $$;
revoke all on function public.affordable_output(public.admission_item, bigint) from public, anon, authenticated;
grant execute on function public.affordable_output(public.admission_item, bigint) to service_role;

create function public.limits_json(p_state public.limit_state, p_now timestamptz) returns jsonb
language sql immutable as $$
    select jsonb_build_object(
        'request_limit', p_state.request_limit, 'request_left', p_state.request_left,
        'request_reset', public.retry_after_seconds(p_state.request_reset_ms, p_now),
        'token_limit', p_state.token_limit, 'token_left', p_state.token_left,
        'token_reset', public.retry_after_seconds(p_state.token_reset_ms, p_now))
$$;
revoke all on function public.limits_json(public.limit_state, timestamptz) from public, anon, authenticated;
grant execute on function public.limits_json(public.limit_state, timestamptz) to service_role;

-- Holds, counts and writes the pending record of a request that nothing refuses.
create function public.record_admission(
    p_item public.admission_item, p_key public.api_keys_new, p_key_usage public.rate_limit_usage, p_user_usage public.rate_limit_usage,
    p_granted bigint, p_hold bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_need bigint := p_item.prompt_estimate;
    v_test int := (p_key.environment_tag = 'test')::int;
begin
    insert into public.usage_records (request_id, client_request_id, user_id, key_id, mode, environment, endpoint, model, prompt_estimate,
                                      output_granted, hold_nanos, markup, streamed, created_at, expires_at)
    values (p_item.request_id, left(p_item.client_request_id, 256), p_key.user_id, p_key.id, p_item.mode, p_key.environment_tag, p_item.endpoint,
            p_item.models[1], v_need, p_granted, p_hold, p_item.markup, p_item.streamed, p_now,
            p_now + make_interval(secs => p_item.ttl_seconds));
    if p_hold > 0 then
        update public.users set held_nanos = held_nanos + p_hold where id = p_key.user_id;
    end if;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_user_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_user_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_user_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_user_usage.day_ring, 25, null, 1, v_need),
        plan_day = p_user_usage.plan_day, plan_day_requests = p_user_usage.plan_day_requests + 1,
        plan_day_tokens = p_user_usage.plan_day_tokens + v_need,
        plan_month = p_user_usage.plan_month, plan_month_requests = p_user_usage.plan_month_requests + 1,
        plan_month_tokens = p_user_usage.plan_month_tokens + v_need,
        slots = slots + 1, test_slots = test_slots + v_test, requests_used = requests_used + 1, last_used_at = p_now,
        pending_since = case when slots = 0 then p_now else least(pending_since, p_now) end
    where subject = 'user' and subject_id = p_key.user_id;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_key_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_key_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_key_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_key_usage.day_ring, 25, null, 1, v_need),
        slots = slots + 1, requests_used = requests_used + 1, last_used_at = p_now,
        budget_since = p_key_usage.budget_since, budget_spent_nanos = p_key_usage.budget_spent_nanos,
        budget_held_nanos = budget_held_nanos + p_hold
    where subject = 'key' and subject_id = p_key.id;
end $$;
revoke all on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, timestamptz) to service_role;

create function public.refuse_for_limits(p_item public.admission_item, p_key public.api_keys_new, p_state public.limit_state, p_now timestamptz)
returns jsonb language plpgsql as $$
begin
    return jsonb_build_object(
        'outcome', case when p_state.refused_window = 'concurrency' then 'concurrency'
                        when p_state.refused_window like 'plan %' then 'plan_limit' else 'rate_limit' end,
        'window', p_state.refused_window, 'unit', p_state.refused_unit, 'limit', p_state.refused_limit,
        'need', p_item.prompt_estimate, 'never', p_state.never, 'retry_after', public.retry_after_seconds(p_state.frees_at_ms, p_now),
        'limits', public.limits_json(p_state, p_now),
        'expired', case when p_state.refused_window = 'concurrency' then public.recount_user(p_key.user_id, p_key.id, p_now) end);
end $$;
revoke all on function public.refuse_for_limits(public.admission_item, public.api_keys_new, public.limit_state, timestamptz)
    from public, anon, authenticated;
grant execute on function public.refuse_for_limits(public.admission_item, public.api_keys_new, public.limit_state, timestamptz)
    to service_role;

-- The answer to a request that passed the identity checks: limits, budget and credits decide, in this order.
create function public.admit_checked(p_item public.admission_item, p_key public.api_keys_new, p_user public.users, p_now timestamptz)
returns jsonb language plpgsql as $$
declare
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
    v_user_usage public.rate_limit_usage;
    v_plan public.plans := public.current_plan(p_user, p_now);
    v_state public.limit_state;
    v_free boolean := p_key.environment_tag = 'test';
    v_budget bigint;
    v_available bigint := p_user.credits_nanos - p_user.held_nanos;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
begin
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then -- without counters nothing would be limited
        insert into public.rate_limit_usage (subject, subject_id) values ('user', p_user.id) returning * into v_user_usage;
    end if;
    select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
    if not found then
        insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
        values ('key', p_key.id, null, null, null, null)
        returning * into v_key_usage;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found and v_key_usage.day_ring is null then
        v_key_usage.burst_ring := public.empty_ring(11);
        v_key_usage.minute_ring := public.empty_ring(7);
        v_key_usage.hour_ring := public.empty_ring(13);
        v_key_usage.day_ring := public.empty_ring(25);
    end if;
    v_user_usage := public.advance_usage(v_user_usage, p_now, null);
    v_key_usage := public.advance_usage(v_key_usage, p_now, p_key.budget_window);
    if v_key_usage.requests_used >= p_key.max_requests then
        return public.refusal('REQUEST_LIMIT_EXCEEDED', p_item, p_user.id, p_key.id) || jsonb_build_object('limit', p_key.max_requests);
    elsif v_plan.allowed_models is not null and not public.models_allowed(v_plan.allowed_models, p_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif not v_free and p_user.subscription_status = 'trial' and p_user.trial_expires_at <= p_now then
        return jsonb_build_object('outcome', 'trial_expired');
    end if;
    v_state := public.check_all_limits(p_key, p_user, v_plan, v_key_limits, v_key_usage, v_user_usage, p_item.prompt_estimate, p_now);
    if v_state.refused_window is not null then
        return public.refuse_for_limits(p_item, p_key, v_state, p_now);
    end if;
    if not v_free then
        v_budget := p_key.budget_nanos - v_key_usage.budget_spent_nanos - v_key_usage.budget_held_nanos;
        v_granted := public.affordable_output(p_item, greatest(0, least(v_available, v_budget)));
        if v_granted < p_item.min_output then
            return jsonb_build_object(
                'outcome', case when v_budget < v_available then 'budget' else 'credits' end,
                'needed_nanos', ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.min_output) * p_item.markup),
                'available_nanos', greatest(0, least(v_available, v_budget)), 'balance_nanos', p_user.credits_nanos,
                'held_nanos', p_user.held_nanos, 'affordable_output', greatest(0, v_granted),
                'limits', public.limits_json(v_state, p_now),
                'expired', case when p_user.held_nanos > 0 then public.recount_user(p_user.id, p_key.id, p_now) end);
        end if;
        v_hold := ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * p_item.markup);
    end if;
    perform public.record_admission(p_item, p_key, v_key_usage, v_user_usage, v_granted, v_hold, p_now);
    v_state.request_left := v_state.request_left - 1;
    v_state.token_left := v_state.token_left - p_item.prompt_estimate;
    return jsonb_build_object('outcome', 'admitted', 'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag,
                              'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', p_user.credits_nanos,
                              'limits', public.limits_json(v_state, p_now));
end $$;
revoke all on function public.admit_checked(public.admission_item, public.api_keys_new, public.users, timestamptz)
    from public, anon, authenticated;
grant execute on function public.admit_checked(public.admission_item, public.api_keys_new, public.users, timestamptz) to service_role;

create function public.repeat_admission(p_item public.admission_item) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', 'admitted', 'user_id', r.user_id, 'key_id', r.key_id, 'environment', r.environment,
                              'granted_output', r.output_granted, 'hold_nanos', r.hold_nanos, 'balance_nanos', u.credits_nanos,
                              'limits', '{}'::jsonb)
    from public.usage_records r join public.users u on u.id = r.user_id
    where r.request_id = p_item.request_id and r.key_id = public.find_key(p_item.hashes)
$$;
comment on function public.repeat_admission is 'The first answer to a request id that was sent before, when its reply was lost.';
revoke all on function public.repeat_admission(public.admission_item) from public, anon, authenticated;
grant execute on function public.repeat_admission(public.admission_item) to service_role;

create function public.admit_one(p_item public.admission_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_key public.api_keys_new;
    v_user public.users;
    v_owner bigint;
    v_refusal text;
    v_answer jsonb;
begin
    if p_item.resent then
        v_answer := public.repeat_admission(p_item);
        if v_answer is not null then
            return v_answer;
        end if;
    end if;
    select * into v_key from public.api_keys_new where id = public.find_key(p_item.hashes);
    if not found and p_item.legacy_hash is not null then
        select user_id into v_owner from public.api_keys where key_sha256 = p_item.legacy_hash and moved_to is null;
        if v_owner = any (p_locked) then
            v_key := public.move_legacy_key(p_item.legacy_hash, p_item.hashes[1], p_item.secret_id);
        end if;
    end if;
    v_owner := coalesce(v_key.user_id, v_owner);
    if v_owner is not null and v_owner <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    end if;
    select * into v_user from public.users where id = v_key.user_id;
    if not exists (select from public.gateway_state where mode = p_item.mode) then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    v_refusal := public.refuse_identity(v_key, v_user, p_item, v_now);
    if v_refusal is not null then
        return public.refusal(v_refusal, p_item, v_user.id, v_key.id);
    end if;
    if v_key.hash_secret_id <> p_item.secret_id and v_key.key_hash = any (p_item.hashes) then
        update public.api_keys_new set key_hash = p_item.hashes[1], hash_secret_id = p_item.secret_id where id = v_key.id;
    end if;
    if p_item.holds then
        return public.admit_checked(p_item, v_key, v_user, v_now);
    end if;
    return jsonb_build_object('outcome', 'verified', 'user_id', v_user.id, 'key_id', v_key.id, 'environment', v_key.environment_tag,
                              'role', v_user.role, 'key_name', v_key.key_name, 'key_prefix', v_key.key_prefix, 'last4', v_key.last4,
                              'scopes', v_key.scope_permissions);
end $$;
revoke all on function public.admit_one(public.admission_item, bigint[]) from public, anon, authenticated;
grant execute on function public.admit_one(public.admission_item, bigint[]) to service_role;

-- The users whose keys these items present, before anything is known to be well-formed.
create function public.admission_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg(coalesce(
        (select n.user_id from public.api_keys_new n where n.id = public.find_key(h.hashes) limit 1),
        (select l.user_id from public.api_keys l where l.key_sha256 = i ->> 'legacy_hash' and l.moved_to is null limit 1)))
    from jsonb_array_elements(p_items) as i, lateral (
        select case jsonb_typeof(i -> 'hashes') when 'array' then array(select jsonb_array_elements_text(i -> 'hashes')) end as hashes
    ) as h
$$;
revoke all on function public.admission_users(jsonb) from public, anon, authenticated;
grant execute on function public.admission_users(jsonb) to service_role;

create function public.admit_requests(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.admission_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
    v_notes jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.admit_one(jsonb_populate_record(null::public.admission_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        if v_answer ? 'note' then
            v_notes := v_notes || (v_answer -> 'note');
        end if;
        v_answers := v_answers || (v_answer - 'note' || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    if cardinality(v_notes) > 0 then
        perform public.note_refusals(v_notes);
    end if;
    return to_jsonb(v_answers);
end $$;
comment on function public.admit_requests is
    'Decides for each item (admission_item) in order. Answers carry request_id and outcome: admitted, verified, busy, wrong_mode, failed, '
    'or the code of a refusal.';
revoke all on function public.admit_requests(jsonb) from public, anon, authenticated;
grant execute on function public.admit_requests(jsonb) to service_role;


-- ============================================================================
-- settlement
-- ============================================================================

-- Settlement: finishes records, releases holds, charges, corrects the token counters. Idempotent per request id.
-- due = ceil(billable x the record's markup); cost = min(due, own hold + unheld credits); overrun = due - cost.

create type public.settlement_item as (
    request_id uuid,
    status text,
    source text,
    billable_nanos numeric,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    model_used text,
    provider text,
    finish_reason text,
    error_code text,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id text
);
revoke all on type public.settlement_item from public, anon, authenticated;
grant usage on type public.settlement_item to service_role;

create function public.correct_ring(p_ring bigint[], p_size int, p_admitted bigint, p_now bigint, p_delta bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := public.advance_ring(p_ring, p_size, p_now);
begin
    return public.count_in_ring(v_ring, p_size, case when p_delta < 0 then p_admitted end, 0, p_delta);
end $$;
comment on function public.correct_ring is
    'More tokens than estimated count now; fewer are taken back where the estimate was counted, so that no bucket falls below zero.';
revoke all on function public.correct_ring(bigint[], int, bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.correct_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.release_counters(
    p_record public.usage_records, p_budget_window text, p_delta bigint, p_cost bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_then bigint := extract(epoch from p_record.created_at) * 1000;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_record.created_at at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_record.created_at at time zone 'UTC')::date;
    v_first boolean := p_record.status = 'pending';
    v_released int := v_first::int;
    v_since timestamptz := public.budget_start(p_budget_window, p_now);
begin
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        plan_day_tokens = greatest(0, plan_day_tokens + case when plan_day = v_day or p_delta > 0 then p_delta else 0 end),
        plan_month_tokens = greatest(0, plan_month_tokens + case when plan_month = v_month or p_delta > 0 then p_delta else 0 end),
        slots = greatest(0, slots - v_released),
        test_slots = greatest(0, test_slots - case when p_record.environment = 'test' then v_released else 0 end)
    where subject = 'user' and subject_id = p_record.user_id;
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        slots = greatest(0, slots - v_released),
        budget_spent_nanos = greatest(0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(0, budget_held_nanos - case when v_first then p_record.hold_nanos else 0 end)
    where subject = 'key' and subject_id = p_record.key_id;
end $$;
revoke all on function public.release_counters(public.usage_records, text, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.release_counters(public.usage_records, text, bigint, bigint, timestamptz) to service_role;

create function public.write_settlement(
    p_item public.settlement_item, p_cost bigint, p_overrun bigint, p_upstream bigint, p_now timestamptz
) returns void language sql as $$
    update public.usage_records set
        status = p_item.status, settlement_source = p_item.source, settled_at = p_now,
        upstream_cost_nanos = p_upstream, cost_nanos = p_cost, overrun_nanos = p_overrun,
        prompt_tokens = p_item.prompt_tokens, completion_tokens = p_item.completion_tokens,
        cached_tokens = p_item.cached_tokens, reasoning_tokens = p_item.reasoning_tokens,
        model_used = coalesce(p_item.model_used, model_used), provider = coalesce(p_item.provider, provider),
        finish_reason = coalesce(p_item.finish_reason, finish_reason), error_code = coalesce(p_item.error_code, error_code),
        latency_ms = coalesce(latency_ms, p_item.latency_ms),
        time_to_first_token_ms = coalesce(time_to_first_token_ms, p_item.time_to_first_token_ms),
        generation_id = coalesce(left(p_item.generation_id, 256), generation_id)
    where request_id = p_item.request_id
$$;
revoke all on function public.write_settlement(public.settlement_item, bigint, bigint, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.write_settlement(public.settlement_item, bigint, bigint, bigint, timestamptz) to service_role;

-- What is left of play money's hold when a database has gone live: it leaves the account, as the unheld play credits did.
create function public.expire_play_rest(p_record public.usage_records, p_cost bigint) returns void
language plpgsql as $$
declare
    v_rest bigint := p_record.hold_nanos - p_cost;
    v_balance bigint;
begin
    if p_record.mode <> 'sandbox' or p_record.status <> 'pending' or v_rest <= 0
       or not exists (select from public.gateway_state where mode = 'live') then
        return;
    end if;
    update public.users set credits_nanos = credits_nanos - v_rest where id = p_record.user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason)
    values (p_record.user_id, 'expiry', -v_rest, v_balance, 'gateway', 'play credits end when the gateway goes live');
end $$;
revoke all on function public.expire_play_rest(public.usage_records, bigint) from public, anon, authenticated;
grant execute on function public.expire_play_rest(public.usage_records, bigint) to service_role;

create function public.settlement_answer(p_request_id uuid, p_outcome text) returns jsonb
language sql stable as $$
    select jsonb_build_object('outcome', p_outcome, 'status', r.status, 'cost_nanos', r.cost_nanos, 'overrun_nanos', r.overrun_nanos,
                              'balance_nanos', u.credits_nanos, 'user_id', r.user_id)
    from public.usage_records r join public.users u on u.id = r.user_id where r.request_id = p_request_id
$$;
revoke all on function public.settlement_answer(uuid, text) from public, anon, authenticated;
grant execute on function public.settlement_answer(uuid, text) to service_role;

-- Tokens as the windows count them: what is known, else the estimate. What an upstream invents must not overflow the counters.
create function public.counted_tokens(p_prompt bigint, p_completion bigint, p_estimate bigint) returns bigint
language sql immutable as $$
    select coalesce(least(greatest(p_prompt::numeric + p_completion, 0), 1e12)::bigint, p_estimate)
$$;
revoke all on function public.counted_tokens(bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.counted_tokens(bigint, bigint, bigint) to service_role;

create function public.settle_one(p_item public.settlement_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_record public.usage_records;
    v_held bigint;
    v_upstream bigint := ceil(p_item.billable_nanos);
    v_due bigint;
    v_cost bigint;
    v_unheld bigint;
    v_before bigint;
begin
    select * into v_record from public.usage_records where request_id = p_item.request_id;
    if not found then
        return jsonb_build_object('outcome', 'unknown');
    elsif v_record.user_id <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    elsif v_record.status <> 'pending' and (v_record.settlement_source <> 'none' or p_item.source = 'none') then
        return public.settlement_answer(p_item.request_id, 'repeated');
    end if;
    v_held := case when v_record.status = 'pending' then v_record.hold_nanos else 0 end;
    if v_record.environment = 'test' then
        v_upstream := 0;
        v_due := 0;
    else
        v_due := ceil(p_item.billable_nanos * v_record.markup);
    end if;
    -- Unheld credits of a live database are real money: play money's requests cost no more than what was held for them.
    select case when v_record.mode = s.mode then u.credits_nanos - u.held_nanos else 0 end into v_unheld
    from public.users u, public.gateway_state s where u.id = v_record.user_id;
    v_cost := least(v_due, v_record.cost_nanos + v_held + v_unheld);
    v_before := case when v_record.status = 'pending' then v_record.prompt_estimate
                     else public.counted_tokens(v_record.prompt_tokens, v_record.completion_tokens, v_record.prompt_estimate) end;
    perform public.write_settlement(p_item, v_cost, v_due - v_cost, v_upstream, v_now);
    update public.users set credits_nanos = credits_nanos - (v_cost - v_record.cost_nanos), held_nanos = held_nanos - v_held
    where id = v_record.user_id;
    perform public.release_counters(
        v_record, (select k.budget_window from public.api_keys_new k where k.id = v_record.key_id),
        public.counted_tokens(p_item.prompt_tokens, p_item.completion_tokens, v_record.prompt_estimate) - v_before,
        v_cost - v_record.cost_nanos, v_now);
    perform public.expire_play_rest(v_record, v_cost);
    return public.settlement_answer(p_item.request_id, 'settled');
end $$;
revoke all on function public.settle_one(public.settlement_item, bigint[]) from public, anon, authenticated;
grant execute on function public.settle_one(public.settlement_item, bigint[]) to service_role;

-- The users whose requests these items name, before anything is known to be well-formed.
create function public.settlement_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg((
        select r.user_id from public.usage_records r
        where r.request_id = case when i ->> 'request_id' ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                                  then (i ->> 'request_id')::uuid end limit 1))
    from jsonb_array_elements(p_items) as i
$$;
revoke all on function public.settlement_users(jsonb) from public, anon, authenticated;
grant execute on function public.settlement_users(jsonb) to service_role;

create function public.settle_requests(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.settle_one(jsonb_populate_record(null::public.settlement_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        v_answers := v_answers || (v_answer || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    return to_jsonb(v_answers);
end $$;
comment on function public.settle_requests is
    'Finishes each item (settlement_item). Answers carry request_id and outcome: settled, repeated (the first settlement stands), '
    'unknown, busy or failed.';
revoke all on function public.settle_requests(jsonb) from public, anon, authenticated;
grant execute on function public.settle_requests(jsonb) to service_role;

create function public.note_generation(p_item public.settlement_item, p_locked bigint[]) returns text
language plpgsql set search_path = '' as $$
declare
    v_user_id bigint;
begin
    select user_id into v_user_id from public.usage_records where request_id = p_item.request_id;
    if v_user_id is not null and v_user_id <> all (p_locked) then
        return 'busy';
    end if;
    update public.usage_records set generation_id = p_item.generation_id where request_id = p_item.request_id and status = 'pending';
    return case when found then 'noted' else 'settled' end;
end $$;
revoke all on function public.note_generation(public.settlement_item, bigint[]) from public, anon, authenticated;
grant execute on function public.note_generation(public.settlement_item, bigint[]) to service_role;

-- Stores generation ids of requests that are still running, so that any instance can finish them.
create function public.note_generations(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_outcome text;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_outcome := public.note_generation(jsonb_populate_record(null::public.settlement_item, v_raw), v_locked);
        exception when others then
            v_outcome := 'failed';
        end;
        v_answers := v_answers || jsonb_build_object('outcome', v_outcome, 'request_id', v_raw -> 'request_id');
    end loop;
    return to_jsonb(v_answers);
end $$;
revoke all on function public.note_generations(jsonb) from public, anon, authenticated;
grant execute on function public.note_generations(jsonb) to service_role;

-- Expired holds, oldest first, and the watermark behind which none can be. It stays a minute behind, for admissions that are
-- still in a transaction: a hold that lives for less than their transaction took would otherwise appear behind it.
create function public.list_expired_holds(p_limit int) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_holds jsonb;
begin
    with expired as (
        select r.request_id, r.generation_id, r.mode, r.environment, r.expires_at from public.usage_records r
        where r.expires_at >= (select swept_until from public.gateway_state) and r.expires_at <= v_now and r.status = 'pending'
        order by r.expires_at limit p_limit
    ), moved as (
        update public.gateway_state set swept_until = m.until
        from (select least(min(expires_at), v_now - interval '1 minute') as until from expired) as m
        where singleton and swept_until < m.until
    )
    select coalesce(jsonb_agg(jsonb_build_object('request_id', request_id, 'generation_id', generation_id, 'mode', mode,
                                                 'environment', environment) order by expires_at), '[]') into v_holds from expired;
    return v_holds;
end $$;
revoke all on function public.list_expired_holds(int) from public, anon, authenticated;
grant execute on function public.list_expired_holds(int) to service_role;

-- An expiry that is moved to before the watermark takes the watermark along, or the sweep would never see it.
create function public.lower_watermark() returns trigger language plpgsql set search_path = '' as $$
begin
    update public.gateway_state set swept_until = least(swept_until, new.expires_at) where singleton and swept_until > new.expires_at;
    return null;
end $$;
revoke all on function public.lower_watermark() from public, anon, authenticated;
grant execute on function public.lower_watermark() to service_role;
create trigger usage_records_expiry_moved after update of expires_at on public.usage_records
    for each row execute function public.lower_watermark();


-- ============================================================================
-- accounting
-- ============================================================================

-- Accounting: registration, credits, limits and plans as an admin sets them, the mode of this database, and the proof that it adds up.

create function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124090500::bigint
$$;
revoke all on function public.schema_version() from public, anon, authenticated;
grant execute on function public.schema_version() to service_role;

create function public.count_users() returns bigint language sql stable set search_path = '' as $$
    select count(*) from public.users where deleted_at is null
$$;
revoke all on function public.count_users() from public, anon, authenticated;
grant execute on function public.count_users() to service_role;

create function public.write_audit(
    p_actor text, p_action text, p_target text, p_user_id bigint, p_key_id bigint, p_address text, p_user_agent text, p_request_id uuid,
    p_details jsonb
) returns void language sql set search_path = '' as $$
    insert into public.audit_logs (actor, action, target, user_id, key_id, ip, user_agent, request_id, details)
    values (p_actor, p_action, p_target, p_user_id, p_key_id, p_address::inet, left(p_user_agent, 512), p_request_id,
            coalesce(p_details, '{}'))
$$;
revoke all on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb) from public, anon, authenticated;
grant execute on function public.write_audit(text, text, text, bigint, bigint, text, text, uuid, jsonb) to service_role;

-- Changes the credits of a user whose row is locked, with the ledger entry that explains it. An order that was carried out before
-- returns its first transaction.
create function public.change_credits(
    p_user_id bigint, p_kind text, p_amount_nanos bigint, p_actor text, p_reason text, p_idempotency_key text, p_payment_method text
) returns public.credit_transactions language plpgsql set search_path = '' as $$
declare
    v_entry public.credit_transactions;
    v_balance bigint;
begin
    select * into v_entry from public.credit_transactions where idempotency_key = p_idempotency_key;
    if found then
        return v_entry;
    end if;
    update public.users set credits_nanos = credits_nanos + p_amount_nanos, updated_at = clock_timestamp()
    where id = p_user_id returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason, idempotency_key, payment_method)
    values (p_user_id, p_kind, p_amount_nanos, v_balance, p_actor, p_reason, p_idempotency_key, p_payment_method)
    returning * into v_entry;
    return v_entry;
end $$;
revoke all on function public.change_credits(bigint, text, bigint, text, text, text, text) from public, anon, authenticated;
grant execute on function public.change_credits(bigint, text, bigint, text, text, text, text) to service_role;

create function public.activate_subscription(p_user_id bigint, p_funded boolean) returns void
language sql set search_path = '' as $$
    update public.users set subscription_status = 'active', is_funded = is_funded or p_funded, updated_at = clock_timestamp()
    where id = p_user_id
$$;
revoke all on function public.activate_subscription(bigint, boolean) from public, anon, authenticated;
grant execute on function public.activate_subscription(bigint, boolean) to service_role;

-- An address may do this p_limit times an hour. True counts the attempt, false refuses it.
create function public.count_address(p_subject text, p_limit bigint) returns boolean
language plpgsql set search_path = '' as $$
declare
    v_id bigint := hashtextextended(p_subject, 0);
    v_bucket bigint := extract(epoch from clock_timestamp()) * 1000 / 300000;
    v_ring bigint[];
begin
    insert into public.rate_limit_usage (subject, subject_id) values ('address', v_id) on conflict do nothing;
    select public.advance_ring(hour_ring, 13, v_bucket) into v_ring from public.rate_limit_usage
    where subject = 'address' and subject_id = v_id for no key update;
    if v_ring[27] >= p_limit then
        return false;
    end if;
    update public.rate_limit_usage set hour_ring = public.count_in_ring(v_ring, 13, null, 1, 0), last_used_at = clock_timestamp()
    where subject = 'address' and subject_id = v_id;
    return true;
end $$;
revoke all on function public.count_address(text, bigint) from public, anon, authenticated;
grant execute on function public.count_address(text, bigint) to service_role;

-- p: username, email, auth_method, key {...}, signup_nanos, trial_days, address, address_subject (null: not limited), user_agent,
-- request_id, actor, mode (of the instance). Outcomes: registered, address_limit, username_taken, email_taken, wrong_mode.
create function public.register_user(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users;
    v_key_id bigint;
    v_nanos bigint := (p ->> 'signup_nanos')::bigint;
    v_constraint text;
begin
    -- A switch to live mode waits for this one, or this one for it: play credits of a new account would outlive the switch.
    perform from public.gateway_state where singleton and mode = coalesce(p ->> 'mode', mode) for share;
    if not found then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    if p ->> 'address_subject' is not null and not public.count_address('register:' || (p ->> 'address_subject'), 5) then
        return jsonb_build_object('outcome', 'address_limit');
    end if;
    begin
        insert into public.users (username, email, auth_method, trial_expires_at)
        values (p ->> 'username', p ->> 'email', p ->> 'auth_method',
                clock_timestamp() + make_interval(days => (p ->> 'trial_days')::int))
        returning * into v_user;
    exception when unique_violation then
        get stacked diagnostics v_constraint = constraint_name;
        return jsonb_build_object('outcome', case v_constraint when 'users_email_key' then 'email_taken' else 'username_taken' end);
    end;
    insert into public.rate_limit_usage (subject, subject_id) values ('user', v_user.id);
    v_key_id := public.insert_key(v_user.id, p -> 'key', true);
    if v_nanos > 0 then
        perform public.change_credits(v_user.id, 'grant', v_nanos, 'gateway', 'signup credits', null, null);
    end if;
    perform public.write_audit(coalesce(p ->> 'actor', 'user:' || v_user.id), 'create', 'user:' || v_user.id, v_user.id, v_key_id,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, null);
    select * into v_user from public.users where id = v_user.id;
    return jsonb_build_object('outcome', 'registered', 'user_id', v_user.id, 'key_id', v_key_id, 'credits_nanos', v_user.credits_nanos,
                              'subscription_status', v_user.subscription_status, 'trial_expires_at', v_user.trial_expires_at);
end $$;

create function public.insert_key(p_user_id bigint, p_key jsonb, p_primary boolean) returns bigint
language plpgsql set search_path = '' as $$
declare
    v_id bigint;
begin
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag, scope_permissions,
                                     is_primary)
    values (p_user_id, p_key ->> 'key_name', p_key ->> 'key_prefix', p_key ->> 'last4', p_key ->> 'key_hash', p_key ->> 'hash_secret_id',
            p_key ->> 'environment_tag', p_key -> 'scope_permissions', p_primary)
    returning id into v_id;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_id, null, null, null, null);
    return v_id;
end $$;
revoke all on function public.insert_key(bigint, jsonb, boolean) from public, anon, authenticated;
grant execute on function public.insert_key(bigint, jsonb, boolean) to service_role;
revoke all on function public.register_user(jsonb) from public, anon, authenticated;
grant execute on function public.register_user(jsonb) to service_role;

-- The user an admin means: by id, or by one of their keys. Locked, so that what follows is decided on what it reads.
create function public.lock_target(p jsonb) returns public.users
language plpgsql set search_path = '' as $$
declare
    v_id bigint := (p ->> 'user_id')::bigint;
    v_user public.users;
begin
    if v_id is null then
        select k.user_id into v_id from public.api_keys_new k where k.id = public.target_key(p);
    end if;
    select * into v_user from public.users where id = v_id and deleted_at is null for no key update;
    return v_user;
end $$;

create function public.target_key(p jsonb) returns bigint language sql stable set search_path = '' as $$
    select coalesce((select k.id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint),
                    public.find_key(array(select jsonb_array_elements_text(p -> 'hashes'))))
$$;
revoke all on function public.target_key(jsonb) from public, anon, authenticated;
grant execute on function public.target_key(jsonb) to service_role;
revoke all on function public.lock_target(jsonb) from public, anon, authenticated;
grant execute on function public.lock_target(jsonb) to service_role;

-- p: user_id or hashes, amount_nanos, reason, idempotency_key, actor, address, user_agent, request_id.
-- Outcomes: granted, repeated, not_found, conflict (the idempotency key belongs to another order), too_large.
create function public.grant_credits(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_amount bigint := (p ->> 'amount_nanos')::bigint;
    v_entry public.credit_transactions;
    v_before bigint := (select coalesce(max(t.id), 0) from public.credit_transactions t);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_user.credits_nanos > 9000000000000000000 - v_amount then
        return jsonb_build_object('outcome', 'too_large');
    end if;
    begin
        v_entry := public.change_credits(v_user.id, 'grant', v_amount, p ->> 'actor', coalesce(p ->> 'reason', ''), p ->> 'idempotency_key', null);
    exception when unique_violation then -- the same key, at the same time, for another user
        return jsonb_build_object('outcome', 'conflict');
    end;
    if (v_entry.user_id, v_entry.kind, v_entry.amount_nanos) is distinct from (v_user.id, 'grant'::text, v_amount) then
        return jsonb_build_object('outcome', 'conflict');
    end if;
    if v_entry.id <= v_before then
        return jsonb_build_object('outcome', 'repeated', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                                  'balance_nanos', v_user.credits_nanos);
    end if;
    perform public.activate_subscription(v_user.id, true);
    perform public.write_audit(p ->> 'actor', 'add_credits', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('amount_nanos', v_amount, 'transaction_id', v_entry.id));
    return jsonb_build_object('outcome', 'granted', 'user_id', v_user.id, 'transaction_id', v_entry.id,
                              'balance_nanos', v_entry.balance_after_nanos);
end $$;
revoke all on function public.grant_credits(jsonb) from public, anon, authenticated;
grant execute on function public.grant_credits(jsonb) to service_role;

-- p: user_id, or hashes / key_id for one key (subject: user | key), limits {...}, actor, ... Outcomes: set, not_found.
create function public.set_rate_limits(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_key bigint := case when p ->> 'subject' = 'key' then public.target_key(p) end;
    v_limits public.rate_limit_configs;
begin
    if v_user.id is null or (p ->> 'subject' = 'key' and not exists (
           select from public.api_keys_new k where k.id = v_key and k.user_id = v_user.id)) then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_limits from public.rate_limit_configs
    where (subject, subject_id) in ((p ->> 'subject', coalesce(v_key, v_user.id)), ('default', 0))
    order by (subject = 'default') limit 1;
    if v_key is not null and v_limits.subject = 'default' then
        v_limits := null;
    end if;
    v_limits := jsonb_populate_record(v_limits, p -> 'limits');
    v_limits.subject := p ->> 'subject';
    v_limits.subject_id := coalesce(v_key, v_user.id);
    v_limits.updated_at := clock_timestamp();
    delete from public.rate_limit_configs where subject = v_limits.subject and subject_id = v_limits.subject_id;
    insert into public.rate_limit_configs select v_limits.*;
    perform public.write_audit(p ->> 'actor', 'set_limits', v_limits.subject || ':' || v_limits.subject_id, v_user.id, v_key,
                               p ->> 'address', p ->> 'user_agent', (p ->> 'request_id')::uuid, p -> 'limits');
    return jsonb_build_object('outcome', 'set', 'user_id', v_user.id, 'key_id', v_key, 'limits', to_jsonb(v_limits));
end $$;
revoke all on function public.set_rate_limits(jsonb) from public, anon, authenticated;
grant execute on function public.set_rate_limits(jsonb) to service_role;

-- p: user_id, plan_id, duration_months, actor, ... Outcomes: assigned, not_found, plan_not_found.
create function public.assign_plan(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_plan public.plans;
    v_now timestamptz := clock_timestamp();
    v_end timestamptz := v_now + make_interval(months => (p ->> 'duration_months')::int);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    select * into v_plan from public.plans where id = (p ->> 'plan_id')::bigint and is_active;
    if not found then
        return jsonb_build_object('outcome', 'plan_not_found');
    end if;
    update public.user_plans set is_active = false, end_date = greatest(least(end_date, v_now), start_date + interval '1 microsecond')
    where user_id = v_user.id and is_active;
    insert into public.user_plans (user_id, plan_id, start_date, end_date) values (v_user.id, v_plan.id, v_now, v_end);
    perform public.activate_subscription(v_user.id, false);
    perform public.write_audit(p ->> 'actor', 'assign_plan', 'user:' || v_user.id, v_user.id, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('plan_id', v_plan.id, 'until', v_end));
    return jsonb_build_object('outcome', 'assigned', 'user_id', v_user.id, 'plan_id', v_plan.id, 'plan_name', v_plan.name, 'end_date', v_end);
end $$;
revoke all on function public.assign_plan(jsonb) from public, anon, authenticated;
grant execute on function public.assign_plan(jsonb) to service_role;

-- Which HMAC secrets the stored keys still need: ids, so that start-up can refuse to drop one.
create function public.key_secrets_in_use() returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(distinct s), '[]') from (
        select hash_secret_id as s from public.api_keys_new where revoked_at is null
        union select previous_hash_secret_id from public.api_keys_new where previous_valid_until > now()
    ) as used where s is not null
$$;
revoke all on function public.key_secrets_in_use() from public, anon, authenticated;
grant execute on function public.key_secrets_in_use() to service_role;

-- The database takes this mode, or refuses: a live database never serves invented answers again. The first live start ends play money.
create function public.enter_mode(p_mode text) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_mode text;
    v_user record;
begin
    if p_mode is null or p_mode not in ('sandbox', 'live') then
        raise exception 'there is no mode %', p_mode using errcode = 'invalid_parameter_value';
    end if;
    select mode into v_mode from public.gateway_state where singleton for update;
    if v_mode = p_mode then
        return jsonb_build_object('outcome', 'entered', 'mode', v_mode);
    elsif v_mode = 'live' then
        return jsonb_build_object('outcome', 'refused', 'mode', v_mode);
    end if;
    update public.gateway_state set mode = 'live', mode_since = clock_timestamp() where singleton;
    for v_user in select id, credits_nanos - held_nanos as unheld from public.users order by id for no key update loop
        if v_user.unheld > 0 then
            perform public.change_credits(v_user.id, 'expiry', -v_user.unheld, 'gateway',
                                          'play credits end when the gateway goes live', null, null);
        end if;
        update public.users set is_funded = false where id = v_user.id and is_funded;
    end loop;
    return jsonb_build_object('outcome', 'entered', 'mode', 'live');
end $$;
revoke all on function public.enter_mode(text) from public, anon, authenticated;
grant execute on function public.enter_mode(text) to service_role;

-- Promise 2 as a query: every account whose books do not add up. No row, ever.
create function public.audit_ledger() returns table (user_id bigint, credits_nanos bigint, ledger_nanos numeric, held_nanos bigint, pending_nanos numeric)
language sql stable set search_path = '' as $$
    select u.id, u.credits_nanos, coalesce(t.total, 0) - coalesce(r.charged, 0), u.held_nanos, coalesce(r.pending, 0)
    from public.users u
    left join (select t.user_id, sum(t.amount_nanos) as total from public.credit_transactions t group by 1) t on t.user_id = u.id
    left join (select r.user_id, sum(r.cost_nanos) as charged, sum(r.hold_nanos) filter (where r.status = 'pending') as pending
               from public.usage_records r group by 1) r on r.user_id = u.id
    where u.credits_nanos <> coalesce(t.total, 0) - coalesce(r.charged, 0) or u.held_nanos <> coalesce(r.pending, 0)
$$;
revoke all on function public.audit_ledger() from public, anon, authenticated;
grant execute on function public.audit_ledger() to service_role;


notify pgrst, 'reload schema';
